import { expect, test } from "vitest";
import { Samples } from "../src/data/samples";
import type { Snapshot } from "../src/data/snapshot";
import type { Steps } from "../src/data/steps";
import { partRows, partsOf, phasesOf } from "../src/view/parts";
import { note } from "../src/view/ranks";
import { layersOf, layerTable, said, together, trafficOf } from "../src/view/traffic";

const PRICE = { rowBytes: 1000, stepBytes: 4000 };

const snapshot = (layers: number, tensors: Snapshot["tensors"]): Snapshot => ({ step: 1, layers, experts: 1, tensors });

/** Rows of single steps with parts [1 rank, 2 parts, 2 passes] at the steps where `had` is 1. */
const rows = (steps: number[], had: number[] | null): Steps =>
  ({
    level: 1,
    count: steps.length,
    step: Uint32Array.from(steps),
    tensors: {
      part_ms: { shape: [steps.length, 1, 2, 2], data: Float32Array.from(steps.flatMap((step) => [step, 2, 0, 0])) },
      sent_bytes: { shape: [steps.length, 1], data: Float32Array.from(steps.map((step) => 10 * step)) },
      ...(had ? { part_ms_n: { shape: [steps.length], data: Uint32Array.from(had) } } : {}),
    },
  }) as unknown as Steps;

test("what stays on its rank has not crossed", () => {
  const traffic = trafficOf(Uint32Array.from([5, 3, 2, 6]))!;
  expect(traffic).toEqual({ ranks: 2, sent: 16, crossing: 5, largest: 6, rows: [[5, 3], [2, 6]] });
  expect(said(traffic, PRICE, 1, null)).toBe("5 of 16 rows (31.3 %) left their rank: 5.00 kB in a step, forward and backward; expected 4.00 kB.");
  expect(said(traffic, PRICE, 2, { step: 10, bytes: 4900 })).toBe(
    "5 of 16 rows (31.3 %) left their rank: 5.00 kB in a step, forward and backward; expected 2.00 kB; measured at step 10: 4.90 kB.",
  );
  expect(said(traffic, { rowBytes: 0, stepBytes: 0 }, 1, null)).toBe("5 of 16 rows (31.3 %) left their rank.");
});

test("one rank, or none, has no traffic", () => {
  expect(trafficOf(undefined)).toBeNull();
  expect(trafficOf(Uint32Array.from([4]))).toBeNull();
  expect(trafficOf(Uint32Array.from([4, 1, 2]))).toBeNull();
});

test("layers are told apart and together; a run that told only their sum still shows it", () => {
  const row = snapshot(2, { rank_traffic: Uint32Array.from([5, 3, 2, 6, 1, 0, 0, 9]) });
  const layers = layersOf(row);
  expect(layers.map(({ crossing }) => crossing)).toEqual([5, 0]);
  expect(together(row, layers)?.rows).toEqual([[6, 3], [2, 15]]);
  expect(layerTable(layers, [1, 3], PRICE).rows).toEqual([
    ["1", "16", "5", "31.3 %", "5.00 kB", "2.00 kB", "250 %"],
    ["3", "10", "0", "0.0 %", "0 B", "2.00 kB", "0 %"],
    ["all", "26", "5", "19.2 %", "5.00 kB", "4.00 kB", "125 %"],
  ]);
  const older = snapshot(2, { rank_tokens: Uint32Array.from([6, 3, 2, 15]) });
  expect(layersOf(older)).toEqual([]);
  expect(together(older, [])?.crossing).toBe(5);
});

test("ranks that an attempt did not have are not shown as idle", () => {
  const filled = Uint32Array.from([5, 3, 0, 2, 6, 0, 0, 0, 0]);
  expect(trafficOf(filled)?.rows).toEqual([[5, 3], [2, 6]]);
  expect(trafficOf(Uint32Array.from([5, 0, 0, 0]))).toBeNull();
  const row = snapshot(2, { rank_traffic: Uint32Array.from([...filled, 1, 0, 0, 0, 0, 0, 0, 0, 0]) });
  expect(layersOf(row).map(({ rows }) => rows)).toEqual([[[5, 3], [2, 6]], [[1, 0], [0, 0]]]);
  expect(together(row, layersOf(row))?.rows).toEqual([[6, 3], [2, 6]]);
  expect(phasesOf(snapshot(1, { phase_ms: Float32Array.from([1, 2, 0, 0]) }), ["forward", "backward"])).toHaveLength(1);
  const sample = { step: 1, ranks: 2, partMs: Float32Array.from([1, 2, 0, 0]), sentBytes: null };
  expect(partsOf(sample, ["router"])).toEqual([[{ part: "router", forward: 1, backward: 2 }]]);
});

test("why no times, or no finer ones, are shown: the field that would change it is named", () => {
  expect(note(null, 10, 0)).toBe("The parts of a step appear with the first that is told.");
  expect(note(null, 0, 5)).toMatch(/^Nothing is timed in this run: telemetry.phases_every is 0\./);
  expect(note(null, 10, 5)).toBe("Nothing was timed at this step: parts are, every 10 steps (telemetry.phases_every), except where the model is compiled.");
  expect(note(null, null, 5)).toBe("This run's trainer does not tell where its time goes.");
  expect(note({ sampled: false, ranks: 1 }, 0, 5)).toMatch(/^Finer parts are not timed in this run: telemetry.phases_every is 0\./);
  expect(note({ sampled: false, ranks: 1 }, 10, 5)).toMatch(/^Finer parts are timed every 10 steps/);
  expect(note({ sampled: false, ranks: 1 }, null, 5)).toBe("");
  expect([note({ sampled: true, ranks: 1 }, 10, 5), note({ sampled: true, ranks: 2 }, 10, 5) === ""]).toEqual(["", false]);
});

test("bytes that were not measured are not zero", () => {
  const block = rows([5], [1]);
  block.tensors.sent_bytes_n = { shape: [1], data: Uint32Array.from([0]) };
  const samples = new Samples(5);
  samples.take(block);
  expect([samples.at(5)?.ranks, samples.at(5)?.sentBytes]).toEqual([1, null]);
});

test("phases are cut by rank", () => {
  const row = snapshot(1, { phase_ms: Float32Array.from([1, 2, 3, 4]) });
  expect(phasesOf(row, ["forward", "backward"])?.map((spent) => spent.map(({ forward }) => forward))).toEqual([[1, 2], [3, 4]]);
  expect(phasesOf(row, [])).toBeNull();
  expect(phasesOf(snapshot(1, {}), ["forward"])).toBeNull();
});

test("parts are cut by rank and pass, without those that took no time", () => {
  const sample = { step: 10, ranks: 2, partMs: Float32Array.from([1, 2, 0, 0, 3, 4, 0, 0]), sentBytes: null };
  const parts = partsOf(sample, ["router", "data"])!;
  expect(parts).toEqual([[{ part: "router", forward: 1, backward: 2 }], [{ part: "router", forward: 3, backward: 4 }]]);
  expect(partRows(parts)).toEqual({
    head: ["part", "rank 0 forward, ms", "backward, ms", "rank 1 forward, ms", "backward, ms"],
    rows: [["router", "1", "2", "3", "4"], ["together", "1", "2", "3", "4"]],
  });
  expect(partsOf(sample, ["router"])).toBeNull();
});

test("a sample stands for the steps up to the next", () => {
  const samples = new Samples(5);
  samples.take(rows([4, 5, 6], [0, 1, 0]));
  expect(samples.at(4)).toBeNull();
  expect([...samples.at(9)!.partMs]).toEqual([5, 2, 0, 0]);
  expect([...samples.at(9)!.sentBytes!]).toEqual([50]);
  expect(samples.at(10)).toBeNull();
  expect([samples.missing(4), samples.missing(9), samples.missing(12)]).toEqual([0, 0, 10]);
  samples.take(rows([10], [0]), 10); // that step was asked for, and has none
  expect(samples.missing(12)).toBe(0);
  expect(samples.at(12)).toBeNull();
});

test("where nobody knows how often, the last sample counts, and none is fetched", () => {
  const samples = new Samples(0);
  samples.take(rows([3], null));
  expect(samples.at(900)?.step).toBe(3);
  expect(samples.missing(900)).toBe(0);
});
