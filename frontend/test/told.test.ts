import { expect, test } from "vitest";
import { Series } from "../src/data/series";
import { reachOut, rowsIn, sparse, toldBeside, untold } from "../src/data/told";
import { rows } from "./blocks";

const told = (steps: number[], level = 1): Series => {
  const series = new Series(level);
  series.apply(rows(steps, steps.map(() => 1)));
  return series;
};
const steps = Float64Array.from([500, 1000, 1500]);

test("a range between told steps is said to be empty, with what lies beside it", () => {
  const series = told([500, 1000]);
  expect(untold(series, { from: 520, to: 990 }, 500)).toBe("Nothing was told of steps 520 to 990; nearest: steps 500 and 1,000. This run tells every 500 steps (telemetry.every).");
  expect(untold(series, { from: 1, to: 120 }, null)).toBe("Nothing was told of steps 1 to 120; nearest: step 500.");
  expect(untold(series, { from: 1, to: 500 }, 500)).toBe("");
  expect(untold(new Series(), { from: 1, to: 1 }, 500)).toBe("");
});

test("a row of several steps may hold some of the range; one of a single step does not", () => {
  expect(untold(told([900, 1000], 1024), { from: 120, to: 480 }, null)).toBe("");
  expect(untold(told([1000], 1024), { from: 120, to: 480 }, null)).toContain("nearest: step 1,000");
});

test("the rows of a range, or those on either side of it", () => {
  expect(rowsIn(steps, { from: 500, to: 1000 })).toEqual([0, 1]);
  expect(rowsIn(steps, { from: 501, to: 999 })).toEqual([0, 1]);
  expect(rowsIn(steps, { from: 1, to: 9 })).toEqual([0, 0]);
  expect(rowsIn(steps, { from: 1501, to: 2000 })).toEqual([2, 2]);
  expect(reachOut(told([500, 1000, 1500]), { from: 600, to: 1000 })).toEqual({ from: 500, to: 1500 });
});

test("few told steps are marked, and the first steps of a run that tells all of them are not", () => {
  expect(sparse(steps, { from: 1, to: 2000 })).toBe(true);
  expect(sparse(steps, { from: 900, to: 1100 })).toBe(true);
  expect(sparse(Float64Array.from([1, 2, 3]), { from: 1, to: 3 })).toBe(false);
});

test("the told step beside: by `every` where several share a row, and never the other way", () => {
  const beside = (series: Series, step: number, every: number | null) => ([-1, 1] as const).map((by) => toldBeside({ seriesAtStep: series, step, every, lastStep: 5000 }, by));
  const coarse = told([1024, 2048, 3072, 4096, 5000], 1024);
  expect(beside(coarse, 2050, 1)).toEqual([2049, 2051]);
  expect(beside(coarse, 2050, 500)).toEqual([2000, 2500]);
  expect(beside(coarse, 5000, 300)).toEqual([4800, 5000]);
  expect(beside(coarse, 2050, null)).toEqual([2048, 3072]);
  const fine = told([500, 1000, 1500]);
  expect(beside(fine, 700, 500)).toEqual([500, 1000]);
  expect(beside(fine, 1000, 500)).toEqual([500, 1500]);
  expect(beside(fine, 300, 500), "before the first").toEqual([300, 500]);
  expect(beside(fine, 1500, 500), "where a zoom ends").toEqual([1000, 2000]);
  expect(beside(fine, 1500, null)).toEqual([1000, 1500]);
});
