import { expect, test } from "vitest";
import type { Snapshot } from "../src/data/snapshot";
import { phasesOf, said, trafficOf } from "../src/view/ranks";

test("what stays on its rank has not crossed", () => {
  const traffic = trafficOf(Uint32Array.from([5, 3, 2, 6]))!;
  expect(traffic).toEqual({ ranks: 2, sent: 16, crossing: 5, largest: 6, rows: [[5, 3], [2, 6]] });
  expect(said(traffic, 1000, 4000)).toBe("5 of 16 rows (31.3 %) left their rank: 5.00 kB in a step, forward and backward; expected 4.00 kB.");
  expect(said(traffic, 0, 0)).toBe("5 of 16 rows (31.3 %) left their rank.");
});

test("one rank, or none, has no traffic", () => {
  expect(trafficOf(undefined)).toBeNull();
  expect(trafficOf(Uint32Array.from([4]))).toBeNull();
  expect(trafficOf(Uint32Array.from([4, 1, 2]))).toBeNull();
});

test("phases are cut by rank", () => {
  const row: Snapshot = { step: 1, layers: 1, experts: 1, tensors: { phase_ms: Float32Array.from([1, 2, 3, 4]) } };
  expect(phasesOf(row, ["forward", "backward"])).toEqual([[1, 2], [3, 4]]);
  expect(phasesOf(row, [])).toBeNull();
  expect(phasesOf({ ...row, tensors: {} }, ["forward"])).toBeNull();
});
