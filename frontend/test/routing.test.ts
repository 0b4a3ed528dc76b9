import { expect, test } from "vitest";
import { deadCount, fairRatios, maxVio } from "../src/data/fair";
import { LayerHistory, binRatios } from "../src/data/layer";
import { firstSteps } from "../src/data/series";
import { Snapshots, chunkSteps, snapshotsOf } from "../src/data/snapshot";
import { decodeSteps, type Steps } from "../src/data/steps";
import { RunStore } from "../src/data/store";
import type { Run } from "../src/data/types";
import { flow } from "../src/view/compose";
import { DEAD, NONE, REACH, SIZE, indexOf, lut } from "../src/view/colour";
import { layerRows, readCell, whyNoCounts } from "../src/view/reading";
import { fixture, rows } from "./blocks";

test("ratios to the fair share: 1 is even, a layer without tokens is unknown", () => {
  const ratios = fairRatios(Uint32Array.from([1, 1, 2, 0, 0, 0]), 2, 3);
  expect([...ratios.subarray(0, 3)]).toEqual([0.75, 0.75, 1.5]);
  expect(ratios[3]).toBeNaN();
  expect(maxVio(ratios.subarray(0, 3))).toBe(0.5);
  expect(deadCount(Float32Array.from([0, 1, 2]))).toBe(1);
});

test("a layer's history takes its own row of whole blocks, and the only row of its own", () => {
  const whole = new LayerHistory(1, 4);
  whole.apply(decodeSteps(fixture("steps.bin")));
  expect([...whole.tokens.subarray(0, 8)]).toEqual([4, 5, 6, 7, 12, 13, 14, 15]);
  const alone = new LayerHistory(1, 2);
  alone.apply(rows([1, 2], [0, 0], { tokens: [[3, 1], [2, 2]] }));
  expect([...alone.ratios(0)]).toEqual([1.5, 1]);
});

test("coarse rows and live rows of a layer add up", () => {
  const history = new LayerHistory(0, 2, 64);
  history.apply(rows([63], [0], { level: 64, n: [63], tokens: [[63, 0]] }));
  history.apply(rows([64, 65], [0, 0], { tokens: [[0, 1], [5, 5]] }));
  expect(history.length).toBe(2);
  expect([...history.tokens.subarray(0, 4)]).toEqual([63, 1, 5, 5]);
});

test("a row of several steps says from which to which", () => {
  const history = new LayerHistory(0, 1, 64);
  history.apply(rows([64, 128, 150, 192], [0, 0, 0, 0], { level: 64, n: [64, 64, 1, 1], tokens: [[1], [1], [1], [1]] }));
  expect([...firstSteps(history)!]).toEqual([1, 65, 150, 192]);
  expect(firstSteps(new LayerHistory(0, 1))).toBeNull();
  const { firsts, steps } = binRatios(history, 1, 192, 2);
  expect([[...firsts], [...steps]]).toEqual([[1, 150], [128, 192]]);
});

test("a key that is too long for one row goes on in the next", () => {
  expect(flow([50, 50, 100, 200, 10], 120)).toEqual([{ x: 0, row: 0 }, { x: 68, row: 0 }, { x: 0, row: 1 }, { x: 0, row: 2 }, { x: 0, row: 3 }]);
});

test("bins sum their rows and never exceed the columns there are", () => {
  const history = new LayerHistory(0, 2);
  history.apply(rows([1, 2, 3, 4], [0, 0, 0, 0], { tokens: [[2, 0], [0, 2], [4, 0], [4, 0]] }));
  const { ratios, columns, steps } = binRatios(history, 1, 4, 2);
  expect(columns).toBe(2);
  expect([...ratios]).toEqual([1, 2, 1, 0]);
  expect([...steps]).toEqual([2, 4]);
  expect(binRatios(history, 3, 4, 100).columns).toBe(2);
});

test("the row at a step is the last one up to it, in the chunk that covers it", () => {
  const snapshots = new Snapshots();
  snapshots.add(1, 30, snapshotsOf(rows([10, 20, 30], [0, 0, 0], { tokens: [[1], [2], [3]] })));
  expect(snapshots.at(25)?.step).toBe(20);
  expect(snapshots.at(3)?.step).toBe(10);
  expect(snapshots.at(31)).toBeUndefined();
  snapshots.append(snapshotsOf(rows([31, 32], [0, 0], { tokens: [[4], [5]] })));
  expect(snapshots.at(32)?.tensors.expert_tokens?.[0]).toBe(5);
});

test("what was not told at a step is not there, and is no zero", () => {
  const block = rows([1, 2, 3], [0, 0, 0], { tokens: [[4, 4], [0, 0], [0, 8]] });
  block.tensors.expert_tokens_n = { shape: [3], data: Uint32Array.from([1, 0, 1]) };
  block.tensors.dropped = { shape: [3, 1, 2], data: Uint32Array.from([0, 1, 0, 0, 0, 0]) };
  block.tensors.dropped_n = { shape: [3], data: Uint32Array.from([1, 0, 0]) };
  const [first, second, third] = snapshotsOf(block);
  expect(Object.keys(first.tensors)).toEqual(["expert_tokens", "dropped"]);
  expect(second).toEqual({ step: 2, layers: 1, experts: 2, tensors: {} });
  expect([...third.tensors.expert_tokens!]).toEqual([0, 8]);
  expect(third.tensors.dropped).toBeUndefined();

  const store = new RunStore({ id: 1, attempt: 1, metric_names: [], moe_layers: [5], experts: 2 } as unknown as Run);
  store.applySteps(block);
  expect(whyNoCounts(store)).toBeUndefined();
  expect(layerRows(store).rows.map((row) => row[5])).toEqual(["–", "–"]);
  expect(readCell(store, { layer: 0, expert: 1, step: 3 }, undefined)).toBe("step 3 · layer 5 · expert 1 · 8 tokens · 100.0 % of the tokens · 2 × fair share");
  store.setStep(2); // pictures are of step 1, the last that told
  expect(whyNoCounts(store)).toBeUndefined();
  expect(layerRows(store).rows.map((row) => row[1])).toEqual(["4", "4"]);
  expect(readCell(store, { layer: 0, expert: 1, step: 2 }, undefined)).toBe("step 2 · layer 5 · expert 1 · tokens not told");

  const never = new RunStore({ id: 1, attempt: 1, metric_names: [], moe_layers: [5], experts: 2 } as unknown as Run);
  block.tensors.expert_tokens_n.data.fill(0);
  never.applySteps(block);
  expect(whyNoCounts(never)).toBe("The trainer did not tell the experts' loads at step 3.");
  expect(layerRows(never).rows).toEqual([]);
});

test("a view says why its own fetch failed, and the others do not", () => {
  const store = new RunStore({ id: 1, attempt: 1, metric_names: [], moe_layers: [0], experts: 2 } as unknown as Run);
  const heard: string[] = [];
  store.on("failure", () => heard.push([...store.failures.keys()].join()));
  store.fail("sample", "Could not be loaded.");
  expect(whyNoCounts(store)).toBeUndefined();
  store.fail("snapshot", "Could not be loaded.");
  expect(whyNoCounts(store)).toBe("Could not be loaded.");
  store.fail("snapshot", "Could not be loaded.");
  store.fail("snapshot");
  expect(heard).toEqual(["sample", "sample,snapshot", "sample"]);
});

test("as many steps are fetched as the numbers allow: ranks count where they share experts, and nowhere else", () => {
  expect(chunkSteps(16, 64, 1)).toBe(195);
  expect(chunkSteps(16, 64, 8)).toBe(97); // 16 x (64 + 8 x 8)
  expect(chunkSteps(0, 0, 1)).toBe(200);
  expect(chunkSteps(1000, 1000, 1)).toBe(1);
});

test("steps of a dense model are kept too, and long ones are let go", () => {
  const dense = (steps: number[]): Steps => {
    const block = { ...rows(steps, steps.map(() => 0)), moe_layers: [], n_experts: 0 };
    block.tensors.phase_ms = { shape: [steps.length, 1, 2], data: Float32Array.from(steps.flatMap((step) => [step, 2])) };
    return block;
  };
  const snapshots = new Snapshots(100_000);
  for (let start = 1; start < 4000; start += 100) snapshots.append(snapshotsOf(dense(Array.from({ length: 100 }, (_, i) => start + i))));
  expect([...snapshots.at(4000)!.tensors.phase_ms!]).toEqual([4000, 2]);
  expect(snapshots.at(1)).toBeUndefined();
});

test("lets old rows go when there are too many cells", () => {
  const snapshots = new Snapshots(600);
  const wide = [new Array<number>(100).fill(1)];
  for (let step = 1; step <= 8; step++) snapshots.add(step, step, snapshotsOf(rows([step], [0], { tokens: wide })));
  expect(snapshots.at(1)).toBeUndefined();
  expect(snapshots.at(8)).toBeDefined();
});

test("colours: the fair share lies in the middle, the ends are clamped, the dead stand out", () => {
  expect(indexOf(1)).toBe(Math.round((SIZE - 1) / 2));
  expect([indexOf(2 ** -REACH), indexOf(1e-9), indexOf(2 ** REACH), indexOf(1e9)]).toEqual([0, 0, SIZE - 1, SIZE - 1]);
  expect([indexOf(0), indexOf(NaN)]).toEqual([DEAD, NONE]);
  for (const theme of ["dark", "light"] as const) {
    const table = lut(theme);
    expect(new Set([...table.subarray(0, SIZE)]).size).toBeGreaterThan(200);
    expect(table[NONE]).toBe(0);
    expect([...table.subarray(0, SIZE)]).not.toContain(table[DEAD]);
  }
});
