/** Ranks: what each spends its step on, and, where they share the experts, what they send to each other, at the chosen step. */
import type { Snapshot } from "../data/snapshot";
import type { RunStore } from "../data/store";
import { initBehind } from "./behind";
import { all, byId, el, setText } from "./dom";
import { throttled } from "./frame";
import { bars, partRows, partsOf, phasesOf, type Spent } from "./parts";
import { initSave, type Savable } from "./save";
import { layersOf, layerTable, matrix, said, together } from "./traffic";

export function initRanks(store: RunStore, parts: string[]): void {
  const figure = byId("ranks");
  const price = { rowBytes: Number(figure.dataset.rowBytes), stepBytes: Number(figure.dataset.stepBytes) };
  const layerField = byId<HTMLSelectElement>("ranks-layer");
  const units = all<HTMLButtonElement>("[data-unit]", figure);
  let inBytes = false;

  const times = (): { ranks: Spent[][]; step: number; sampled: boolean } | null => {
    const sample = store.samples.at(store.step);
    const told = sample && partsOf(sample, parts);
    if (told) return { ranks: told, step: sample.step, sampled: true };
    const row = store.snapshots.at(store.step);
    const phases = row && phasesOf(row, store.run.phases ?? []);
    return phases ? { ranks: phases, step: row.step, sampled: false } : null;
  };

  const drawTimes = () => {
    const shown = times();
    if (!shown && !store.snapshots.at(store.step) && !store.failures.has("snapshot") && store.lastStep) return; // still on its way
    byId("ranks-parts").replaceChildren(...(shown ? bars(shown.ranks, shown.sampled) : []));
    setText(figure.querySelector(".readout"), shown ? `step ${shown.step}` : "");
    const failed = store.failures.get("sample") ?? (shown ? undefined : store.failures.get("snapshot"));
    setText(byId("ranks-note"), failed ?? note(shown ? { sampled: shown.sampled, ranks: shown.ranks.length } : null, store.samples.every, store.lastStep));
  };

  const drawTraffic = () => {
    const row = store.snapshots.at(store.step);
    const layers = row ? layersOf(row) : [];
    const sum = row && together(row, layers);
    byId("ranks-traffic").hidden = !sum;
    if (!sum) return;
    fillLayers(layerField, layers.length, store.run.moe_layers);
    const chosen = layerField.value ? layers[Number(layerField.value)] : undefined;
    const sample = store.samples.at(store.step);
    const measured = !chosen && sample?.sentBytes ? { step: sample.step, bytes: [...sample.sentBytes].reduce((sum, sent) => sum + sent, 0) } : null;
    const caption = `Rows sent between ranks at step ${row.step}`;
    byId("ranks-matrix").replaceChildren(...matrix(chosen ?? sum, caption, inBytes ? price.rowBytes : 0));
    setText(byId("ranks-said"), said(chosen ?? sum, price, chosen ? layers.length : 1, measured));
  };

  const draw = throttled(200, () => {
    drawTimes();
    drawTraffic();
  });
  for (const unit of units) {
    unit.hidden = !price.rowBytes;
    unit.addEventListener("click", () => {
      inBytes = unit.dataset.unit === "bytes";
      for (const other of units) other.setAttribute("aria-pressed", String(other === unit));
      drawTraffic();
    });
  }
  layerField.addEventListener("change", drawTraffic);
  initBehind(figure, () => partRows(times()?.ranks ?? []));
  initSave(figure, store, () => savableTimes(times()), ["CSV"]);
  initSave(byId("ranks-traffic"), store, () => savableTraffic(store.snapshots.at(store.step), layerField.value, store.run.moe_layers), ["CSV"]);
  initBehind(byId("ranks-traffic"), () => {
    const row = store.snapshots.at(store.step);
    return layerTable(row ? layersOf(row) : [], store.run.moe_layers, price);
  });
  store.on(["snapshot", "cursor", "run", "steps", "failure"], draw);
  draw();
}

function savableTimes(shown: { ranks: Spent[][]; step: number } | null): Savable | null {
  if (!shown) return null;
  const rows = shown.ranks.flatMap((spent, rank) => spent.map(({ part, forward, backward }) => [shown.step, rank, part, forward, backward]));
  return { steps: [shown.step, shown.step], table: { head: ["step", "rank", "part", "forward_ms", "backward_ms"], rows } };
}

/** `chosen`: a row of the layers, or empty for all together. */
function savableTraffic(row: Snapshot | undefined, chosen: string, names: number[]): Savable | null {
  const layers = row ? layersOf(row) : [];
  const traffic = chosen ? layers[Number(chosen)] : row && together(row, layers);
  if (!row || !traffic) return null;
  const layer = chosen ? (names[Number(chosen)] ?? chosen) : "all";
  const rows = traffic.rows.flatMap((sent, from) => sent.map((count, to) => [row.step, layer, from, to, count]));
  return { steps: [row.step, row.step], table: { head: ["step", "layer", "from_rank", "to_rank", "rows"], rows } };
}

/** What the reader should know of the times: how often they are told in full, or why there are none. `every`: steps between samples, null where nobody knows. */
export function note(shown: { sampled: boolean; ranks: number } | null, every: number | null, lastStep: number): string {
  if (!lastStep) return "The parts of a step appear with the first that is told.";
  const rare = every ? `every ${every} steps (telemetry.phases_every), except where the model is compiled` : "";
  const never = "telemetry.phases_every is 0. With 10, every tenth step is told part by part.";
  if (!shown) return every === null ? "This run's trainer does not tell where its time goes." : every ? `Nothing was timed at this step: parts are, ${rare}.` : `Nothing is timed in this run: ${never}`;
  if (!shown.sampled) return every === null ? "" : every ? `Finer parts are timed ${rare}.` : `Finer parts are not timed in this run: ${never}`;
  return shown.ranks > 1 ? "At a sampled step ranks wait for each other before they communicate: waiting is that, communication what the transfer itself takes." : "";
}

function fillLayers(field: HTMLSelectElement, layers: number, names: number[]): void {
  field.hidden = !layers;
  if (field.options.length === layers + 1) return;
  const options = Array.from({ length: layers }, (_, i) => el("option", { value: String(i) }, `Layer ${names[i] ?? i}`));
  field.replaceChildren(el("option", { value: "" }, "All layers"), ...options);
}
