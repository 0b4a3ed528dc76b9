/** Balancing: each term of the chosen layer over time, and for every layer what the terms, the router and the capacity say at the chosen step. */
import { metric, percent, whole } from "../data/format";
import type { Numbers } from "../data/block";
import { firstSteps } from "../data/series";
import type { Snapshot } from "../data/snapshot";
import type { RunStore } from "../data/store";
import { byId, el, setText } from "./dom";
import { throttled } from "./frame";
import { otherStep } from "./reading";
import { LineChart, type Drawing } from "./lines";

export function initBalancing(store: RunStore): void {
  const figure = byId("balancing");
  const chart = new LineChart(figure, store, { title: "Balancing terms", height: 180, format: metric, empty: () => store.failures.get("terms"), tick: metric, drawing: () => drawingOf(store) });
  const table = byId("balancing-table");
  const draw = throttled(200, () => {
    const { run, layer } = store;
    figure.classList.toggle("no-terms", !run.balance_terms?.length);
    setText(figure.querySelector("h3"), run.balance_terms?.length ? `Balancing of layer ${run.moe_layers[layer] ?? layer}` : "The router, layer by layer");
    const row = store.snapshots.at(store.step);
    if (row) table.replaceChildren(...tableOf(store, row));
  });
  store.on(["snapshot", "cursor", "run", "layer"], draw);
  store.on("layer", () => chart.redraw());
  draw();
}

function drawingOf(store: RunStore): Drawing | null {
  const series = store.terms;
  if (!series?.length) return null;
  const columns = [...series.columns.keys()].map((name, i) => ({ line: { label: name, colour: `--line-${(i % 6) + 1}` }, view: series.view(name)! }));
  return { x: series.step.subarray(0, series.length), first: firstSteps(series), lines: columns.map(({ line }) => line), values: columns.map(({ view }) => view.mean), band: null };
}

function tableOf(store: RunStore, row: Snapshot): HTMLElement[] {
  const { head, rows } = layersAt(row, store.run.moe_layers, store.run.balance_terms ?? []);
  const body = rows.map(([name, ...cells], at) => {
    const choose = el("button", { type: "button", className: "step-link", title: "Show this layer in every picture" }, name);
    choose.addEventListener("click", () => store.setLayer(at));
    return el("tr", at === store.layer ? { "aria-current": "true" } : {}, el("td", {}, choose), ...cells.map((text) => el("td", {}, text)));
  });
  return [
    el("caption", row.step === store.step ? { className: "sr-only" } : {}, row.step === store.step ? `Balancing at step ${whole(row.step)}` : otherStep(store, row)),
    el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, ...body),
  ];
}

/** A row for each layer: the terms without their weights, the router's entropy, what was dropped, and the range of the selection bias. */
export function layersAt(row: Snapshot, layers: number[], terms: string[]): { head: string[]; rows: string[][] } {
  const { balance_loss: values, router_entropy: entropy, dropped, expert_bias: bias, expert_tokens: tokens } = row.tensors;
  const shown = terms.length ? terms : [];
  const told = values?.length === row.layers * terms.length ? values : undefined;
  const head = ["layer", ...shown, "router entropy", "dropped", ...(bias ? ["bias"] : [])];
  const rows = Array.from({ length: row.layers }, (_, layer) => {
    const own = (tensor: Numbers) => tensor.subarray(layer * row.experts, (layer + 1) * row.experts);
    return [
      String(layers[layer] ?? layer),
      ...shown.map((_, term) => metric(told?.[layer * terms.length + term])),
      entropy ? `${metric(entropy[layer])} nats` : "–",
      dropped && tokens ? droppedText(total(own(dropped)), total(own(tokens))) : "–",
      ...(bias ? [`${metric(Math.min(...own(bias)))} … ${metric(Math.max(...own(bias)))}`] : []),
    ];
  });
  return { head, rows };
}

const total = (values: Numbers): number => {
  let sum = 0;
  for (const value of values) sum += value;
  return sum;
};

const droppedText = (dropped: number, all: number): string => (dropped ? `${whole(dropped)} (${percent(dropped / Math.max(all, 1))})` : "0");
