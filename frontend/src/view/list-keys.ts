/** The list's keys: search, from run to run, choose. Enter opens a run, as on every link. */
import { all, byId } from "./dom";
import { initKeys } from "./keys";

const names = (): HTMLAnchorElement[] => all<HTMLAnchorElement>("tr.row a.name");

export function initListKeys(): void {
  /** Rows are written anew while they live: the place is kept by the run. */
  let row = "";
  document.addEventListener("focusin", ({ target }) => (row = (target as Element).closest("tr.row")?.id ?? row));
  const by = (rows: number) => () => {
    const links = names();
    const at = links.findIndex((link) => link.closest("tr")!.id === row);
    const next = at < 0 ? links[0] : links[Math.min(Math.max(at + rows, 0), links.length - 1)];
    next?.focus();
    next?.scrollIntoView({ block: "nearest" });
    return next ? undefined : "no runs";
  };
  initKeys([
    { key: "/", does: "Search", act: () => byId<HTMLInputElement>("search").select(), control: "#search" },
    { key: "j", does: "Next run (Enter opens it)", act: by(1) },
    { key: "k", does: "Previous run", act: by(-1) },
    { key: "x", does: "Choose the run, to compare, archive or cancel", act: () => choose(row) },
    { key: "n", does: "New run", act: () => location.assign("/runs/new") },
  ]);
}

function choose(row: string): string {
  const box = row ? document.getElementById(row)?.querySelector<HTMLInputElement>("[data-choose]") : null;
  box?.click();
  return box ? (box.checked ? "chosen" : "not chosen") : "";
}
