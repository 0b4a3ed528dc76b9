/** Ranks: what each spends its step on, and, where they share the experts, what they send to each other, at the chosen step. */
import { bytes, metric, percent, whole } from "../data/format";
import type { Numbers } from "../data/block";
import type { Snapshot } from "../data/snapshot";
import type { RunStore } from "../data/store";
import { byId, el, setText } from "./dom";
import { throttled } from "./frame";

export interface Traffic {
  ranks: number;
  sent: number;
  crossing: number;
  largest: number;
  rows: number[][];
}

export function initRanks(store: RunStore): void {
  const figure = byId("ranks");
  const rowBytes = Number(figure.dataset.rowBytes);
  const stepBytes = Number(figure.dataset.stepBytes);
  const draw = throttled(200, () => {
    const row = store.snapshots.at(store.step);
    const phases = row && phasesOf(row, store.run.phases ?? []);
    const traffic = row && trafficOf(row.tensors.rank_tokens);
    figure.classList.toggle("is-empty", !phases);
    if (phases) byId("ranks-phases").replaceChildren(...phases.map((spent, rank) => bar(store.run.phases ?? [], spent, rank, Math.max(...phases.map(total)))));
    byId("ranks-traffic").hidden = !traffic;
    if (traffic) byId("ranks-matrix").replaceChildren(...matrix(traffic, store.step));
    if (traffic) setText(byId("ranks-said"), said(traffic, rowBytes, stepBytes));
    setText(figure.querySelector(".readout"), phases ? `step ${store.step}` : "");
  });
  store.on(["snapshot", "cursor", "run", "steps"], draw);
  draw();
}

const total = (values: number[]): number => values.reduce((sum, value) => sum + value, 0);

/** Milliseconds [rank][phase]; null where the step has none. */
export function phasesOf(row: Snapshot, names: string[]): number[][] | null {
  const values = row.tensors.phase_ms;
  if (!values || !names.length || values.length % names.length) return null;
  return Array.from({ length: values.length / names.length }, (_, rank) => [...values.subarray(rank * names.length, (rank + 1) * names.length)]);
}

/** The rank × rank counts; null where ranks share no experts. */
export function trafficOf(values: Numbers | undefined): Traffic | null {
  const ranks = Math.round(Math.sqrt(values?.length ?? 0));
  if (!values || ranks < 2 || ranks * ranks !== values.length) return null;
  const rows = Array.from({ length: ranks }, (_, from) => [...values.subarray(from * ranks, (from + 1) * ranks)]);
  const sent = total(rows.map(total));
  return { ranks, sent, crossing: sent - total(rows.map((row, i) => row[i])), largest: Math.max(...rows.flat()), rows };
}

function bar(names: string[], spent: number[], rank: number, longest: number): HTMLElement {
  const whole = total(spent);
  const parts = spent.map((ms, i) => {
    const part = el("span", { className: `phase phase-${i % 8}`, title: `${names[i]} ${metric(ms)} ms` });
    part.style.width = `${(100 * ms) / Math.max(longest, 1e-9)}%`;
    return part;
  });
  const told = names.map((name, i) => `${name} ${metric(spent[i])} ms (${percent(spent[i] / Math.max(whole, 1e-9))})`).join(", ");
  const track = el("div", { className: "phase-track", role: "img", "aria-label": `Rank ${rank}: ${told}` }, ...parts);
  const key = names.map((name, i) => el("span", { className: "phase-key" }, el("i", { className: `phase-${i % 8}` }), `${name} ${metric(spent[i])} ms`));
  return el("div", { className: "phase-row" }, el("span", { className: "mono" }, `rank ${rank}`), track, el("div", { className: "phase-keys" }, ...key));
}

function matrix(traffic: Traffic, step: number): HTMLElement[] {
  const ids = traffic.rows.map((_, rank) => rank);
  const body = traffic.rows.map((row, from) =>
    el("tr", {}, el("th", { scope: "row" }, `from ${from}`), ...row.map((count, to) => {
      const cell = el("td", from === to ? { className: "own" } : {}, whole(count));
      cell.style.setProperty("--share", String(Math.round((100 * count) / Math.max(traffic.largest, 1))));
      return cell;
    })),
  );
  return [
    el("caption", { className: "sr-only" }, `Rows sent between ranks at step ${step}`),
    el("thead", {}, el("tr", {}, el("td", {}), ...ids.map((to) => el("th", { scope: "col" }, `to ${to}`)))),
    el("tbody", {}, ...body),
  ];
}

/** What crossed, and what the accountant expected to. */
export function said(traffic: Traffic, rowBytes: number, stepBytes: number): string {
  const crossed = `${whole(traffic.crossing)} of ${whole(traffic.sent)} rows (${percent(traffic.crossing / Math.max(traffic.sent, 1))}) left their rank`;
  if (!rowBytes) return `${crossed}.`;
  return `${crossed}: ${bytes(traffic.crossing * rowBytes)} in a step, forward and backward; expected ${bytes(stepBytes)}.`;
}
