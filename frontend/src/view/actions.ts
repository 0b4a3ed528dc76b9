/** What a person can do to a run: each button is one REST call, the same that scripts make. */
import { change } from "../data/api";
import type { RunStore } from "../data/store";
import type { Run } from "../data/types";
import { all, byId, el, setText } from "./dom";
import { tellError, toast } from "./toast";

const SAID: Record<string, string> = {
  cancel: "Cancelling: the run stops after a checkpoint",
  pause: "Pausing: the run stops after a checkpoint",
  resume: "Resuming: the run is queued",
  restart: "Restarted: the run is queued again",
  checkpoint: "A checkpoint is on its way",
};

export function initActions(store: RunStore): void {
  for (const button of all<HTMLButtonElement>("[data-action]")) {
    button.addEventListener("click", () => void act(store, button).catch(tellError));
  }
  initStar(store);
  initEdit(store);
}

async function act(store: RunStore, button: HTMLButtonElement): Promise<void> {
  const action = button.dataset.action!;
  if (button.dataset.confirm && !(await confirmed(button.dataset.confirm))) return;
  button.disabled = true;
  try {
    if (action === "clone") {
      const clone = await change<Run>("POST", `/runs/${store.run.id}/clone`, {});
      location.assign(clone.url.startsWith("/runs/") ? clone.url : `/runs/${clone.id}`);
      return;
    }
    if (action === "delete") {
      await change("DELETE", `/runs/${store.run.id}`);
      location.assign("/runs");
      return;
    }
    const run = await change<Run>("POST", `/runs/${store.run.id}/${action}`, {});
    if (run?.id === store.run.id) store.applyRun(run);
    else if (run?.id) location.assign(`/runs/${run.id}`);
    toast(SAID[action] ?? "Done");
  } finally {
    button.disabled = false;
  }
}

/** Asks in the page's own dialog. */
function confirmed(question: string): Promise<boolean> {
  const dialog = byId<HTMLDialogElement>("confirm");
  setText(byId("confirm-text"), question);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

function initStar(store: RunStore): void {
  const star = byId<HTMLButtonElement>("star");
  const draw = () => {
    star.setAttribute("aria-pressed", String(store.run.starred));
    setText(star, store.run.starred ? "★" : "☆");
  };
  star.addEventListener("click", () => void change<Run>("PATCH", `/runs/${store.run.id}`, { starred: !store.run.starred }).then((run) => store.applyRun(run), tellError));
  store.on("run", draw);
  draw();
}

/** Name, tags and notes in one dialog. */
function initEdit(store: RunStore): void {
  const dialog = byId<HTMLDialogElement>("edit");
  const [name, tags, notes] = [byId<HTMLInputElement>("edit-name"), byId<HTMLInputElement>("edit-tags"), byId<HTMLTextAreaElement>("edit-notes")];
  // A viewer has no such button.
  document.getElementById("edit-open")?.addEventListener("click", () => {
    name.value = store.run.name;
    tags.value = store.run.tags.join(", ");
    notes.value = store.run.notes;
    dialog.showModal();
  });
  dialog.querySelector("form")!.addEventListener("submit", (event) => {
    if ((event.submitter as HTMLButtonElement | null)?.value !== "save") return;
    event.preventDefault();
    const body = { name: name.value, tags: tags.value.split(",").map((tag) => tag.trim()).filter(Boolean), notes: notes.value };
    void change<Run>("PATCH", `/runs/${store.run.id}`, body).then((run) => {
      store.applyRun(run);
      dialog.close();
    }, tellError);
  });
  store.on("run", () => {
    setText(byId("run-name"), store.run.name);
    byId("run-tags").replaceChildren(...store.run.tags.map((tag) => el("a", { className: "tag", href: `/runs?tag=${encodeURIComponent(tag)}` }, tag)));
  });
}
