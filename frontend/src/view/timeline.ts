/** The bar that moves the whole page through time: scrubber, step, follow-live, layer, and the range shown. */
import { whole } from "../data/format";
import { untold } from "../data/told";
import { TERMINAL } from "../data/types";
import type { RunStore } from "../data/store";
import { all, byId, el, setText } from "./dom";
import { perFrame } from "./frame";

export function initTimeline(store: RunStore): void {
  const scrubber = byId<HTMLInputElement>("scrubber");
  const number = byId<HTMLInputElement>("step-number");
  const follow = byId<HTMLButtonElement>("follow");
  const ranges = all<HTMLButtonElement>("[data-range]");
  const draw = perFrame(() => {
    const { from, to } = store.shown;
    scrubber.min = String(from);
    scrubber.max = number.max = String(to);
    scrubber.value = String(store.step);
    scrubber.setAttribute("aria-valuetext", `step ${store.step} of ${store.lastStep}`);
    if (document.activeElement !== number) number.value = String(store.step);
    scrubber.style.setProperty("--at", `${to > from ? ((store.step - from) / (to - from)) * 100 : 100}%`);
    setText(follow, TERMINAL.has(store.run.state) ? "Latest" : "Live");
    follow.setAttribute("aria-pressed", String(store.follow));
    setText(byId("range-text"), store.range ? `steps ${whole(from)}–${whole(to)}` : store.lastStep ? `all ${whole(store.lastStep)} steps` : "no steps yet");
    scrubber.disabled = number.disabled = !store.lastStep;
    byId("range-all").hidden = !store.range;
    const why = untold(store.whole, store.shown, store.every);
    setText(byId("untold"), why);
    byId("untold").hidden = !why;
    for (const button of ranges) button.disabled = Number(button.dataset.range) >= store.lastStep;
  });
  scrubber.addEventListener("input", () => store.setStep(Number(scrubber.value)));
  number.addEventListener("change", () => store.setStep(Number(number.value)));
  follow.addEventListener("click", () => store.setStep(store.lastStep, !store.follow));
  byId("range-all").addEventListener("click", () => store.setRange(null));
  for (const button of ranges) button.addEventListener("click", () => showLast(store, Number(button.dataset.range)));
  store.on(["steps", "cursor", "range", "reload", "run"], draw);
  initLayerChoice(store);
  draw();
}

function showLast(store: RunStore, steps: number): void {
  const to = store.lastStep;
  store.setRange(steps >= to ? null : { from: to - steps + 1, to });
}

function initLayerChoice(store: RunStore): void {
  const select = byId<HTMLSelectElement>("layer");
  let shown = "";
  const draw = () => {
    const layers = store.run.moe_layers;
    if (layers.join() !== shown) {
      shown = layers.join();
      select.replaceChildren(...layers.map((layer, row) => el("option", { value: String(row) }, `Layer ${layer}`)));
    }
    select.value = String(store.layer);
    byId("layer-field").hidden = layers.length === 0;
  };
  select.addEventListener("change", () => store.setLayer(Number(select.value)));
  store.on(["run", "layer", "expert"], draw);
  draw();
}
