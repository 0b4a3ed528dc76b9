/** What the pictures say of one cell, in words and in tables. */
import { fairRatios } from "../data/fair";
import { metric, percent, whole } from "../data/format";
import type { Snapshot } from "../data/snapshot";
import type { RunStore } from "../data/store";
import type { Rows } from "./behind";

/** `layer` is a row of the tensors. */
export interface Reading {
  layer: number;
  expert: number;
  step: number;
}

/** "layer 3 · expert 5 · 1,204 tokens · 14.7 % · 1.18 × fair share · probability 0.131". */
export function readCell(store: RunStore, { layer, expert, step }: Reading, ratio: number | undefined): string {
  const row = store.snapshots.at(step);
  const exact = row && Math.abs(row.step - step) < 1 ? cellParts(row, layer, expert) : ratio === undefined ? [] : [share(ratio, store.run.experts), fair(ratio)];
  return [`step ${whole(step)}`, `layer ${store.run.moe_layers[layer] ?? layer}`, `expert ${expert}`, ...exact].join(" · ");
}

const share = (ratio: number, experts: number): string => `${percent(ratio / experts)} of the tokens`;
const fair = (ratio: number): string => (ratio === 0 ? "dead: no token" : `${metric(ratio)} × fair share`);

function cellParts(row: Snapshot, layer: number, expert: number): string[] {
  const at = layer * row.experts + expert;
  const { expert_tokens: tokens, router_prob: prob, dropped, expert_bias: bias } = row.tensors;
  const ratio = tokens && fairRatios(tokens, row.layers, row.experts)[at];
  return [
    ...(tokens && ratio !== undefined ? [`${whole(tokens[at])} tokens`, share(ratio, row.experts), fair(ratio)] : ["tokens not told"]),
    ...(prob ? [`probability ${metric(prob[at])}`] : []),
    ...(dropped?.[at] ? [`${whole(dropped[at])} dropped`] : []),
    ...(bias ? [`bias ${metric(bias[at])}`] : []),
  ];
}

/** The row that pictures of the experts' loads at the chosen step are of: the last that told them, as a trainer need not do at every step. */
export function countsRow(store: RunStore): Snapshot | undefined {
  return store.snapshots.told(store.step, "expert_tokens");
}

/** "Step 500, the last that was told before 700. ": where a picture is of another step than the chosen one. */
export function otherStep(store: RunStore, row: Snapshot | undefined): string {
  if (!row || row.step === store.step) return "";
  return `Step ${whole(row.step)}, the ${row.step < store.step ? "last that was told before" : "first that was told after"} ${whole(store.step)}. `;
}

/** The chosen layer at the chosen step, an expert a row. */
export function layerRows(store: RunStore): Rows {
  const row = countsRow(store);
  const head = ["expert", "tokens", "share", "× fair share", "probability", "dropped", "bias"];
  const tokens = row?.tensors.expert_tokens;
  if (!row || !tokens) return { head, rows: [] };
  const ratios = fairRatios(tokens, row.layers, row.experts);
  const { router_prob: prob, dropped, expert_bias: bias } = row.tensors;
  const rows = Array.from({ length: row.experts }, (_, e) => {
    const at = store.layer * row.experts + e;
    return [String(e), whole(tokens[at]), percent(ratios[at] / row.experts, 2), metric(ratios[at]), prob ? metric(prob[at]) : "–", dropped ? whole(dropped[at]) : "–", bias ? metric(bias[at]) : "–"];
  });
  return { head, rows };
}

/** Why the experts' counts at the chosen step cannot be shown; undefined where they can, or where they are still on their way. */
export function whyNoCounts(store: RunStore): string | undefined {
  if (countsRow(store)) return undefined;
  const row = store.snapshots.at(store.step);
  if (row) return `The trainer did not tell the experts' loads at step ${whole(row.step)}.`;
  return store.failures.get("snapshot");
}
