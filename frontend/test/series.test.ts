import { expect, test } from "vitest";
import { Series, bucketOf } from "../src/data/series";
import { rows } from "./blocks";

const values = (series: Series, name = "loss") => [...series.view(name)!.mean];

test("history and then live rows give what one history gives", () => {
  const whole = new Series();
  whole.apply(rows([1, 2, 3, 4], [4, 3, 2, 1]));
  const parts = new Series();
  parts.apply(rows([1, 2], [4, 3]));
  parts.apply(rows([2, 3], [3, 2]));
  parts.apply(rows([3, 4], [2, 1]));
  expect(values(parts)).toEqual(values(whole));
  expect([...parts.step.subarray(0, parts.length)]).toEqual([1, 2, 3, 4]);
});

test("a step counts once, however often it arrives", () => {
  const series = new Series(64);
  expect(series.apply(rows([1, 2], [4, 2]))).toBe(2);
  expect(series.apply(rows([1, 2], [4, 2]))).toBe(0);
  expect(series.n[0]).toBe(2);
});

test("live steps fold into the open bucket of a coarse series, and begin a new one at its border", () => {
  const series = new Series(64);
  series.apply(rows([63], [3], { level: 64, n: [63] }));
  series.apply(rows([64, 65], [67, 5]));
  expect(series.length).toBe(2);
  expect(values(series)).toEqual([(3 * 63 + 67) / 64, 5]);
  expect([series.view("loss")!.min[0], series.view("loss")!.max[0]]).toEqual([3, 67]);
  expect([...series.n.subarray(0, 2)]).toEqual([64, 1]);
});

test("coarsening keeps mean, least, greatest and counts", () => {
  const series = new Series();
  const steps = Array.from({ length: 200 }, (_, i) => i + 1);
  series.apply(rows(steps, steps));
  series.coarsen(64);
  expect([...series.n.subarray(0, series.length)]).toEqual([64, 64, 64, 8]);
  expect(values(series).map((v) => Number(v.toFixed(6)))).toEqual([32.5, 96.5, 160.5, 196.5]);
  expect([...series.view("loss")!.min]).toEqual([1, 65, 129, 193]);
  series.apply(rows([201], [196.5]));
  expect(series.length).toBe(4);
});

test("grows past its first capacity, and unknown values stay unknown", () => {
  const series = new Series();
  const steps = Array.from({ length: 1000 }, (_, i) => i + 1);
  series.apply(rows(steps, steps.map((s) => (s === 500 ? NaN : s))));
  expect(series.length).toBe(1000);
  expect(series.view("loss")!.mean[499]).toBeNaN();
  expect(series.view("loss")!.mean[999]).toBe(1000);
});

test("finds the row of a step", () => {
  const series = new Series();
  series.apply(rows([10, 20, 30], [1, 2, 3]));
  expect([5, 10, 19, 30, 99].map((step) => series.rowAt(step))).toEqual([-1, 0, 0, 2, 2]);
});

test("buckets lie as in the store", () => {
  expect([1, 64, 65, 128].map((step) => bucketOf(step, 64))).toEqual([0, 0, 1, 1]);
});
