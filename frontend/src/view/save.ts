/** Under each picture: save it as PNG, and what it shows as CSV. */
import { csvOf, type Table } from "../data/csv";
import { whole } from "../data/format";
import type { RunStore } from "../data/store";
import { compose, type Shown } from "./compose";
import { el } from "./dom";
import { tellError, toast } from "./toast";

/** What can be saved of a figure now; null where it shows nothing. `steps`: the first and the last that it is of. */
export interface Savable {
  steps: [number, number];
  /** Where the figure's heading does not say enough. */
  title?: string;
  picture?: Omit<Shown, "title" | "about">;
  table: Table;
}

let figures = 0;

export function initSave(figure: HTMLElement, store: RunStore, what: () => Savable | null, formats: ("PNG" | "CSV")[] = ["PNG", "CSV"]): void {
  const title = figure.querySelector<HTMLElement>("h2, h3, h4")!;
  const id = `figure-${++figures}`;
  title.id ||= `${id}-title`;
  const buttons = formats.map((format) => {
    const button = el("button", { type: "button", id: `${id}-${format}`, "aria-labelledby": `${id}-${format} ${title.id}` }, format, el("span", { className: "sr-only" }, " of "));
    button.addEventListener("click", () => void save(format, figure, title.textContent ?? "", store, what).catch(tellError));
    return button;
  });
  const foot = el("div", { className: "figure-foot" }, el("span", { className: "save" }, ...buttons));
  const details = figure.querySelector<HTMLElement>(":scope > details.behind");
  (details ?? figure.querySelector(".plot"))!.after(foot);
  if (details) foot.prepend(details);
}

async function save(format: "PNG" | "CSV", figure: HTMLElement, heading: string, store: RunStore, savable: () => Savable | null): Promise<void> {
  const what = savable();
  if (!what) return toast("There is nothing to save here yet.");
  const title = what.title ?? heading;
  const blob = format === "CSV" ? new Blob([csvOf(what.table)], { type: "text/csv" }) : await png(figure, title, store, what);
  const [from, to] = what.steps;
  const file = [`run-${store.run.id}`, slug(title), from === to ? `step-${from}` : `steps-${from}-${to}`].join("-");
  const link = el("a", { href: URL.createObjectURL(blob), download: `${file}.${format.toLowerCase()}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

const slug = (text: string): string => text.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "");

function png(figure: HTMLElement, title: string, { run }: RunStore, { steps: [from, to], picture }: Savable): Promise<Blob> {
  const about = `${from === to ? `step ${whole(from)}` : `steps ${whole(from)} to ${whole(to)}`} · run ${run.id} · ${run.name}`;
  const page = compose({ ...picture!, title, about }, getComputedStyle(figure), document.querySelector("#routing-scale"));
  return new Promise((resolve, reject) => page.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("The browser made no picture.")))));
}
