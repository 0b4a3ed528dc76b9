/** The table behind a picture: filled when it is opened, for those who cannot or would rather not read the picture. */
import { el } from "./dom";

export interface Rows {
  head: string[];
  rows: string[][];
}

export function initBehind(figure: HTMLElement, rows: () => Rows): void {
  const details = figure.querySelector<HTMLDetailsElement>("details.behind");
  details?.addEventListener("toggle", () => {
    details.querySelector(".behind-table")?.remove();
    if (details.open) details.append(tableOf(rows(), figure.querySelector("h2, h3")?.textContent ?? ""));
  });
}

function tableOf({ head, rows }: Rows, caption: string): HTMLElement {
  const table = el("table", {}, el("caption", { className: "sr-only" }, caption));
  table.append(el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col" }, text)))));
  table.append(el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((text) => el("td", {}, text))))));
  return el("div", { className: "behind-table", tabIndex: 0, role: "region", "aria-label": `Data of ${caption}` }, table);
}
