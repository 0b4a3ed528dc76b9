/** Which steps were told: a trainer may tell every 500th only, and a window, or the cursor, may then lie between two of them. */
import { whole } from "./format";
import { lastUpTo, type Series } from "./series";
import type { Range, RunStore } from "./store";

/** `range` reached out to the told steps on either side of it, so that a line through it comes from somewhere and leads somewhere. */
export function reachOut(series: Series, { from, to }: Range): Range {
  const before = series.rowAt(from - 1);
  const behind = series.rowAt(to) + 1;
  return { from: before >= 0 ? series.step[before] : from, to: behind < series.length ? series.step[behind] : to };
}

/** The told step after the chosen one (`by` 1) or before it (-1); the chosen one where nobody knows of another. */
export function toldBeside({ seriesAtStep: series, step, every, lastStep }: Pick<RunStore, "seriesAtStep" | "step" | "every" | "lastStep">, by: 1 | -1): number {
  const row = series.rowAt(step);
  // Between two told steps the one before is a step back already.
  const beside = by < 0 && row >= 0 && series.step[row] < step ? row : row + by;
  const near = beside >= 0 && beside < series.length ? series.step[beside] : step;
  if (near !== step && (series.level === 1 || !every)) return near;
  // Of several steps in one row the series knows only the last, and a zoom ends.
  const multiple = every ? (by > 0 ? Math.floor(step / every) + 1 : Math.ceil(step / every) - 1) * every : step;
  return multiple < 1 ? step : Math.min(multiple, lastStep);
}

/** The rows, first and last, of ascending `steps` that lie in the range; where none does, those on either side of it. */
export function rowsIn(steps: Float64Array, { from, to }: Range): [number, number] {
  const first = lastUpTo(steps, steps.length, from - 1) + 1;
  const last = lastUpTo(steps, steps.length, to);
  return first <= last ? [first, last] : [Math.max(last, 0), Math.min(first, steps.length - 1)];
}

/** Whether so few steps of the range were told that each is worth a mark. */
export function sparse(steps: Float64Array, range: Range): boolean {
  const rows = lastUpTo(steps, steps.length, range.to) - lastUpTo(steps, steps.length, range.from - 1);
  return rows < 2 || (rows < 60 && rows * 4 < range.to - range.from + 1);
}

/** Why there is nothing to see in a range, in words; empty where there is. `every`: steps between those that are told, null where nobody knows. */
export function untold(series: Series, range: Range, every: number | null): string {
  const next = series.rowAt(range.from - 1) + 1;
  // A row of several steps that stands behind the range may yet hold some of it.
  const within = next < series.length && (series.step[next] <= range.to || (series.n[next] > 1 && series.step[next] < range.to + series.level));
  if (!series.length || within) return "";
  const { from, to } = reachOut(series, range);
  const near = [...(from < range.from ? [whole(from)] : []), ...(to > range.to ? [whole(to)] : [])];
  const steps = range.from === range.to ? `step ${whole(range.from)}` : `steps ${whole(range.from)} to ${whole(range.to)}`;
  return `Nothing was told of ${steps}${near.length ? `; nearest: ${near.length > 1 ? "steps" : "step"} ${near.join(" and ")}` : ""}.${rarely(every)}`;
}

/** " This run tells every 500 steps." where that is worth a word. */
export const rarely = (every: number | null): string => (every && every > 1 ? ` This run tells every ${whole(every)} steps (telemetry.every).` : "");
