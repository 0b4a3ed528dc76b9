/** Where a step's time goes: each rank's parts as a stacked bar, forward and backward; at steps that were not sampled, its phases. */
import { metric, percent } from "../data/format";
import type { Sample } from "../data/samples";
import type { Snapshot } from "../data/snapshot";
import type { Rows } from "./behind";
import { el } from "./dom";

/** Of one rank: milliseconds in the forward and in the backward pass. */
export interface Spent {
  part: string;
  forward: number;
  backward: number;
}

export const WAITING = "waiting";
const total = (spent: Spent[]): number => spent.reduce((sum, { forward, backward }) => sum + forward + backward, 0);

/** Without the ranks behind the last that took any time: among rows of several attempts the store fills up for the ranks that one did not have. */
function present(ranks: Spent[][]): Spent[][] | null {
  const last = ranks.findLastIndex((spent) => total(spent) > 0);
  return last < 0 ? null : ranks.slice(0, last + 1);
}

/** [rank][part] of a sample; parts that took no time on any rank are left out. */
export function partsOf(sample: Sample, names: string[]): Spent[][] | null {
  if (!names.length || sample.partMs.length !== sample.ranks * names.length * 2) return null;
  const all = Array.from({ length: sample.ranks }, (_, rank) =>
    names.map((part, i) => ({ part, forward: sample.partMs[2 * (rank * names.length + i)], backward: sample.partMs[2 * (rank * names.length + i) + 1] })),
  );
  const ranks = present(all);
  if (!ranks) return null;
  const taken = names.map((_, i) => ranks.some((spent) => spent[i].forward + spent[i].backward > 0));
  return ranks.map((spent) => spent.filter((_, i) => taken[i]));
}

/** [rank][phase], which have no passes; null where the step has none. */
export function phasesOf(row: Snapshot, names: string[]): Spent[][] | null {
  const values = row.tensors.phase_ms;
  if (!values || !names.length || values.length % names.length) return null;
  return present(Array.from({ length: values.length / names.length }, (_, rank) => names.map((part, i) => ({ part, forward: values[rank * names.length + i], backward: 0 }))));
}

/** A bar for each rank, of one scale, and the key. */
export function bars(ranks: Spent[][], passes: boolean): HTMLElement[] {
  const longest = Math.max(...ranks.map(total), 1e-9);
  return [...ranks.map((spent, rank) => bar(spent, rank, longest)), key(ranks, passes)];
}

function bar(spent: Spent[], rank: number, longest: number): HTMLElement {
  const whole = Math.max(total(spent), 1e-9);
  const piece = (part: string, pass: string, ms: number) => {
    const node = el("span", { className: `${colour(part)} ${pass === "backward" ? "is-back" : ""}`, title: `${part}, ${pass}: ${metric(ms)} ms (${percent(ms / whole)})` });
    node.style.width = `${(100 * ms) / longest}%`;
    return node;
  };
  const pieces = spent.flatMap(({ part, forward, backward }) => [...(forward ? [piece(part, "forward", forward)] : []), ...(backward ? [piece(part, "backward", backward)] : [])]);
  const told = spent.map(({ part, forward, backward }) => `${part} ${metric(forward + backward)} ms`).join(", ");
  const waits = spent.find(({ part }) => part === WAITING);
  const waited = waits ? waits.forward + waits.backward : 0;
  return el(
    "div",
    { className: "part-row" },
    el("span", { className: "mono" }, `rank ${rank}`),
    el("div", { className: "part-track", role: "img", "aria-label": `Rank ${rank}: ${told}` }, ...pieces),
    el("span", { className: "num part-said" }, `${metric(whole)} ms${waits ? `, waits ${metric(waited)} ms (${percent(waited / whole)})` : ""}`),
  );
}

function key(ranks: Spent[][], passes: boolean): HTMLElement {
  const mean = (i: number) => ranks.reduce((sum, spent) => sum + spent[i].forward + spent[i].backward, 0) / ranks.length;
  const items = ranks[0].map(({ part }, i) => el("span", { className: "part-key" }, el("i", { className: colour(part) }), `${part} ${metric(mean(i))} ms`));
  const back = el("span", { className: "part-key" }, el("i", { className: `${colour("other")} is-back` }), "striped: backward");
  return el("div", { className: "part-keys" }, ...items, passes ? back : null);
}

const colour = (part: string): string => `part part-${part}`;

/** The same as a table: a row for each part, forward and backward on each rank. */
export function partRows(ranks: Spent[][]): Rows {
  const cells = (one: (spent: Spent[]) => { forward: number; backward: number }) => ranks.flatMap((spent) => [metric(one(spent).forward), metric(one(spent).backward)]);
  const sum = (spent: Spent[]) => ({ forward: spent.reduce((all, { forward }) => all + forward, 0), backward: spent.reduce((all, { backward }) => all + backward, 0) });
  return {
    head: ["part", ...ranks.flatMap((_, rank) => [`rank ${rank} forward, ms`, "backward, ms"])],
    rows: [...(ranks[0] ?? []).map(({ part }, i) => [part, ...cells((spent) => spent[i])]), ["together", ...cells(sum)]],
  };
}
