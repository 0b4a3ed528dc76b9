/** One line on how the router fares: what it did over the last steps up to the cursor, and whether that is as it should be. */
import { metric, percent, whole } from "./format";
import type { Snapshot } from "./snapshot";

/** Steps that are looked at together: in a single batch an expert may go empty by chance. */
export const WINDOW = 20;
/**
 * A layer is uneven where its busiest expert takes more than twice its fair share, the heatmap's first strong colour, or is a third of the way to
 * all that it could take.
 */
const UNEVEN = { ratio: 2, way: 1 / 3 };
/** It has collapsed where it works as if it had fewer experts than half way from the k of each token to all: a busy one among others is no collapse. */
const COLLAPSED = 0.5;
/**
 * Experts that would have had fewer tokens than this each at an even load are not called dead for having none, nor their layer collapsed: of E experts
 * the entropy of N assignments comes out about (E - 1) / 2N too low (Miller 1955).
 */
const EXPECTED = 20;
const DROPPED = 0.05;

export interface Health {
  kind: "good" | "warn" | "bad";
  text: string;
}

interface Layer {
  /** Row of the tensors. */
  row: number;
  busiest: number;
  /** The busiest expert's load over the mean. */
  ratio: number;
  /** Experts that it works as if it had: exp of the loads' entropy. All where the loads are equal, k where every token goes to the same k; NaN of too few tokens. */
  effective: number;
  dead: number;
}

/** Of the rows in the window; null where they tell no counts. `layers` names the rows, `topK` experts take each token. */
export function healthOf(rows: Snapshot[], layers: number[], topK: number): Health | null {
  const told = rows.filter(({ tensors }) => tensors.expert_tokens);
  const last = told.at(-1);
  if (!last) return null;
  const same = told.filter((row) => row.layers === last.layers && row.experts === last.experts);
  const found = Array.from({ length: last.layers }, (_, row) => layerOf(same, row, last.experts));
  if (!found.length || found.every(({ ratio }) => Number.isNaN(ratio))) return null;
  const worst = found.reduce((a, b) => (b.ratio > a.ratio || Number.isNaN(a.ratio) ? b : a));
  const name = ({ row }: Layer) => `layer ${layers[row] ?? row}`;
  const most = last.experts / Math.max(topK, 1);
  const way = most > 1 ? (worst.ratio - 1) / (most - 1) : 0;
  const narrowest = found.reduce((a, b) => (b.effective < a.effective || Number.isNaN(a.effective) ? b : a));
  const collapsed = most > 1 && narrowest.effective < topK + COLLAPSED * (last.experts - topK);
  const uneven = worst.ratio > UNEVEN.ratio || way > UNEVEN.way;
  const dead = found.reduce((sum, layer) => sum + layer.dead, 0);
  const deadest = found.reduce((a, b) => (b.dead > a.dead ? b : a));
  const dropped = droppedShare(same);
  const said = [
    dead ? `${whole(dead)} of ${whole(last.layers * last.experts)} experts got no token${last.layers > 1 ? ` (${deadest.dead} in ${name(deadest)})` : ""}` : "every expert gets tokens",
    `the busiest takes ${metric(worst.ratio)} × its fair share (expert ${worst.busiest} of ${name(worst)})`,
    ...(collapsed ? [`${name(narrowest)} works as if it had ${narrowest.effective.toFixed(1)} of ${whole(last.experts)} experts`] : []),
    ...(dropped > DROPPED ? [`${percent(dropped)} of the assignments were dropped`] : []),
  ];
  const word = collapsed ? "has collapsed" : dead ? "leaves experts out" : uneven ? "is uneven" : dropped > DROPPED ? "drops tokens" : "is even";
  const steps = same.length > 1 ? `steps ${whole(same[0].step)} to ${whole(last.step)}` : `step ${whole(last.step)}`;
  return { kind: collapsed || dead ? "bad" : word === "is even" ? "good" : "warn", text: `Routing ${word} (${steps}): ${said.join("; ")}.` };
}

function layerOf(rows: Snapshot[], row: number, experts: number): Layer {
  const sums = new Float64Array(experts);
  for (const { tensors } of rows) for (let e = 0; e < experts; e++) sums[e] += tensors.expert_tokens![row * experts + e];
  const all = sums.reduce((sum, value) => sum + value, 0);
  const [mean, max] = [all / experts, Math.max(...sums)];
  const entropy = sums.reduce((sum, value) => (value ? sum - (value / all) * Math.log(value / all) : sum), 0);
  const enough = mean >= EXPECTED;
  const dead = enough ? sums.filter((value) => value === 0).length : 0;
  return { row, busiest: sums.indexOf(max), ratio: mean ? max / mean : NaN, effective: enough ? Math.exp(entropy) : NaN, dead };
}

function droppedShare(rows: Snapshot[]): number {
  let [dropped, all] = [0, 0];
  for (const { tensors } of rows) {
    if (!tensors.dropped) continue;
    for (const value of tensors.dropped) dropped += value;
    for (const value of tensors.expert_tokens!) all += value;
  }
  return all ? dropped / all : 0;
}
