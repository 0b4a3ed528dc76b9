/** Several runs at once: compare, archive, cancel. */
import { change } from "../data/api";
import { all, byId, setText } from "./dom";
import { tellError, toast } from "./toast";

const chosen = (): HTMLInputElement[] => all<HTMLInputElement>("[data-choose]:checked");

export function initBulk(): void {
  document.addEventListener("change", (event) => {
    const box = event.target as HTMLInputElement;
    if (box.id === "choose-all") for (const one of all<HTMLInputElement>("[data-choose]")) one.checked = box.checked;
    if (box.id === "choose-all" || box.matches("[data-choose]")) draw();
  });
  document.addEventListener("click", (event) => {
    const button = (event.target as Element).closest<HTMLButtonElement>("[data-bulk]");
    if (button) void act(button.dataset.bulk!).catch(tellError);
  });
}

function draw(): void {
  const ids = chosen().map((box) => box.value);
  byId("bulk").hidden = ids.length === 0;
  setText(byId("bulk-count"), String(ids.length));
  byId<HTMLAnchorElement>("bulk-compare").href = `/runs/compare?${ids.map((id) => `id=${id}`).join("&")}`;
}

async function act(action: string): Promise<void> {
  const ids = chosen().map((box) => Number(box.value));
  await change("POST", "/runs/bulk", { action, ids });
  toast(action === "cancel" ? `${ids.length} told to stop` : `${ids.length} archived`);
  for (const box of chosen()) {
    box.checked = false;
    if (action === "archive") box.closest("tr")?.remove();
  }
  draw();
}
