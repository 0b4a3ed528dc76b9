/** What the ranks that share experts send to each other: rows and bytes, of one layer or all, counted, measured and expected. */
import { bytes, percent, whole } from "../data/format";
import type { Numbers } from "../data/block";
import type { Snapshot } from "../data/snapshot";
import type { Rows } from "./behind";
import { el } from "./dom";

/** `rows[from][to]` rows of routed tokens. */
export interface Traffic {
  ranks: number;
  sent: number;
  crossing: number;
  largest: number;
  rows: number[][];
}

/** Bytes of one row in all passes of a step, and those that are to cross in a step, in all layers. */
export interface Price {
  rowBytes: number;
  stepBytes: number;
}

const total = (values: number[]): number => values.reduce((sum, value) => sum + value, 0);

/** One matrix; null where ranks share no experts. */
export const trafficOf = (values: Numbers | undefined): Traffic | null => (values ? (matricesOf(values, 1)[0] ?? null) : null);

/** Each layer's matrix; empty where a run told only of all layers together, or of none. */
export function layersOf(row: Snapshot): Traffic[] {
  const values = row.tensors.rank_traffic;
  return values && row.layers ? matricesOf(values, row.layers) : [];
}

/** Square matrices, one behind the other; none where they are not square, or of one rank. */
function matricesOf(values: Numbers, layers: number): Traffic[] {
  const size = Math.round(Math.sqrt(values.length / layers));
  if (size < 2 || layers * size * size !== values.length) return [];
  const ranks = presentRanks(values, size);
  if (ranks < 2) return [];
  return Array.from({ length: layers }, (_, layer) => {
    const start = (from: number) => (layer * size + from) * size;
    const rows = Array.from({ length: ranks }, (_, from) => [...values.subarray(start(from), start(from) + ranks)]);
    const sent = total(rows.map(total));
    return { ranks, sent, crossing: sent - total(rows.map((row, i) => row[i])), largest: Math.max(...rows.flat()), rows };
  });
}

/** Without the last ranks that neither send nor get anything: among rows of several attempts the store fills up for ranks that one did not have. */
function presentRanks(values: Numbers, size: number): number {
  let last = -1;
  for (let i = 0; i < values.length; i++) if (values[i]) last = Math.max(last, i % size, Math.floor(i / size) % size);
  return last + 1;
}

/** The sum of all layers, also of runs that told nothing else. */
export function together(row: Snapshot, layers: Traffic[]): Traffic | null {
  if (!layers.length) return trafficOf(row.tensors.rank_tokens);
  const { ranks } = layers[0];
  return trafficOf(Float64Array.from({ length: ranks * ranks }, (_, i) => total(layers.map(({ rows }) => rows[Math.floor(i / ranks)][i % ranks]))));
}

export function matrix(traffic: Traffic, caption: string, rowBytes: number): HTMLElement[] {
  const ids = traffic.rows.map((_, rank) => rank);
  const body = traffic.rows.map((row, from) =>
    el("tr", {}, el("th", { scope: "row" }, `from ${from}`), ...row.map((count, to) => {
      const cell = el("td", from === to ? { className: "own", title: "stays on its rank" } : {}, rowBytes ? (from === to ? "–" : bytes(count * rowBytes)) : whole(count));
      cell.style.setProperty("--share", String(Math.round((100 * count) / Math.max(traffic.largest, 1))));
      return cell;
    })),
  );
  return [
    el("caption", { className: "sr-only" }, caption),
    el("thead", {}, el("tr", {}, el("td", {}), ...ids.map((to) => el("th", { scope: "col" }, `to ${to}`)))),
    el("tbody", {}, ...body),
  ];
}

/** What crossed, by the rows that were counted, by the bytes that a sampled step measured, and what the accountant expected. */
export function said(traffic: Traffic, price: Price, layers: number, measured: { step: number; bytes: number } | null): string {
  const crossed = `${whole(traffic.crossing)} of ${whole(traffic.sent)} rows (${percent(traffic.crossing / Math.max(traffic.sent, 1))}) left their rank`;
  if (!price.rowBytes) return `${crossed}.`;
  const counted = `${bytes(traffic.crossing * price.rowBytes)} in a step, forward and backward; expected ${bytes(price.stepBytes / layers)}`;
  return `${crossed}: ${counted}${measured ? `; measured at step ${measured.step}: ${bytes(measured.bytes)}` : ""}.`;
}

/** A row for each layer, and one for all. */
export function layerTable(layers: Traffic[], names: number[], price: Price): Rows {
  const row = (name: string, parts: Traffic[]) => {
    const [sent, crossing] = [total(parts.map((one) => one.sent)), total(parts.map((one) => one.crossing))];
    const expected = (price.stepBytes * parts.length) / layers.length;
    const cells = [name, whole(sent), whole(crossing), percent(crossing / Math.max(sent, 1))];
    return price.rowBytes ? [...cells, bytes(crossing * price.rowBytes), bytes(expected), percent((crossing * price.rowBytes) / expected, 0)] : cells;
  };
  return {
    head: ["layer", "rows", "left their rank", "share", ...(price.rowBytes ? ["bytes", "expected", "of expected"] : [])],
    rows: [...layers.map((one, i) => row(String(names[i] ?? i), [one])), ...(layers.length ? [row("all", layers)] : [])],
  };
}
