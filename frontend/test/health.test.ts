import { expect, test } from "vitest";
import { healthOf } from "../src/data/health";
import { Snapshots, type Snapshot } from "../src/data/snapshot";

/** One step of [layer][expert] counts. */
function row(step: number, counts: number[][], dropped?: number[][]): Snapshot {
  const tensors = { expert_tokens: Uint32Array.from(counts.flat()), ...(dropped && { dropped: Uint32Array.from(dropped.flat()) }) };
  return { step, layers: counts.length, experts: counts[0].length, tensors };
}

test("an even router is called even, with its busiest expert", () => {
  const rows = [row(9, [[30, 30, 30, 30], [36, 28, 28, 28]]), row(10, [[30, 30, 30, 30], [36, 28, 28, 28]])];
  expect(healthOf(rows, [1, 3], 1)).toEqual({
    kind: "good",
    text: "Routing is even (steps 9 to 10): every expert gets tokens; the busiest takes 1.2 × its fair share (expert 0 of layer 3).",
  });
});

test("an expert that is empty in one batch is not dead; one that is empty in all of them is", () => {
  const rows = [row(1, [[60, 20, 40, 0]]), row(2, [[0, 60, 60, 40]])];
  expect(healthOf(rows, [0], 1)?.kind).toBe("good");
  expect(healthOf(rows.slice(0, 1), [0], 1)).toEqual({
    kind: "bad",
    text: "Routing leaves experts out (step 1): 1 of 4 experts got no token; the busiest takes 2 × its fair share (expert 0 of layer 0).",
  });
  expect(healthOf([row(1, [[1, 0, 2, 1]])], [0], 1)?.kind, "one token each says nothing of the dead").toBe("good");
});

test("a layer has collapsed where it works as if it had fewer than half of the experts beyond those of each token", () => {
  expect(healthOf([row(1, [[30, 30, 30, 30], [300, 100, 0, 0]])], [2, 5], 1)).toEqual({
    kind: "bad",
    text:
      "Routing has collapsed (step 1): 2 of 8 experts got no token (2 in layer 5); the busiest takes 3 × its fair share (expert 0 of layer 5); " +
      "layer 5 works as if it had 1.8 of 4 experts.",
  });
  expect(healthOf([row(1, [[290, 40, 40, 30]])], [0], 1)?.text).toMatch(/^Routing has collapsed \(step 1\): every expert gets tokens; .* 2\.4 of 4 /);
  expect(healthOf([row(1, [[260, 50, 50, 40]])], [0], 1)).toMatchObject({ kind: "warn", text: expect.stringMatching(/^Routing is uneven/) });
  expect(healthOf([row(1, [[100, 100]])], [0], 2)?.kind, "all experts take all tokens").toBe("good");
  expect(healthOf([row(1, [[7, 7, 7, 7, 7, 7, 7]])], [0], 7)?.kind, "whatever the entropy's rounding").toBe("good");
});

test("an even router has not collapsed for having had few tokens", () => {
  const few = (tokens: number) => Array.from({ length: 128 }, (_, e) => [2, 1, 0, 0, 1, 0, 0, 0][(e * 5) % 8] * tokens); // 64 of 128 experts' tokens, as chance has it
  expect(healthOf([row(1, [few(1)])], [0], 1)?.text).not.toMatch(/collapsed|works as if/);
  expect(healthOf([row(1, [few(1), few(40)])], [0, 1], 1)?.text, "another layer with many").toMatch(/^Routing has collapsed .*; layer 1 works as if/);
});

test("one expert that most tokens have beside others is busy, and no collapse", () => {
  const shared = [row(1, [[680, 190, 190, 190, 190, 190, 190, 180]])]; // of 1,000 tokens, two for each: 6.9 experts in effect
  expect(healthOf(shared, [0], 2)).toMatchObject({ kind: "warn", text: expect.stringMatching(/^Routing is uneven .* takes 2\.72 × /) });
  const pair = [row(1, [[900, 800, 50, 50, 50, 50, 50, 50]])];
  expect(healthOf(pair, [0], 2)?.text).toMatch(/^Routing has collapsed .*; layer 0 works as if it had 3\.6 of 8 experts\.$/);
});

test("what capacity drops is said where it is more than a little", () => {
  const counts = [[100, 100, 100, 100]];
  expect(healthOf([row(1, counts, [[10, 10, 0, 0]])], [0], 1)?.kind).toBe("good");
  expect(healthOf([row(1, counts, [[20, 10, 0, 0]])], [0], 1)).toEqual({
    kind: "warn",
    text: "Routing drops tokens (step 1): every expert gets tokens; the busiest takes 1 × its fair share (expert 0 of layer 0); 7.5 % of the assignments were dropped.",
  });
});

test("without counts nothing is said, and rows of another shape are left out", () => {
  expect(healthOf([], [0], 1)).toBeNull();
  expect(healthOf([{ step: 1, layers: 1, experts: 4, tensors: {} }], [0], 1)).toBeNull();
  expect(healthOf([row(1, [[0, 0]])], [0], 1)).toBeNull();
  expect(healthOf([row(1, [[900, 0]]), row(2, [[30, 30, 30]])], [0], 1)?.text).toMatch(/^Routing is even \(step 2\)/);
});

test("the window ends at the cursor", () => {
  const snapshots = new Snapshots();
  snapshots.append(Array.from({ length: 30 }, (_, i) => row(i + 1, [[i]])));
  expect(snapshots.upTo(25, 20).map(({ step }) => step)).toEqual(Array.from({ length: 20 }, (_, i) => i + 6));
  expect(snapshots.upTo(3, 20)).toHaveLength(3);
  expect(snapshots.upTo(31, 20)).toEqual([]);
});

test("the window reaches from the live rows into those that were fetched, and stops at a gap", () => {
  const snapshots = new Snapshots();
  const rows = (steps: number[]) => steps.map((step) => row(step, [[step]]));
  snapshots.add(1, 40, rows([10, 20, 30, 40]));
  snapshots.append(rows([50, 60]), 41); // reported every ten steps
  expect(snapshots.upTo(60, 4).map(({ step }) => step)).toEqual([30, 40, 50, 60]);
  expect(snapshots.upTo(60, 9)).toHaveLength(6);
  const gap = new Snapshots();
  gap.add(1, 40, rows([10, 20, 30, 40]));
  gap.append(rows([90, 91]), 90);
  expect(gap.upTo(91, 9).map(({ step }) => step)).toEqual([90, 91]);
  gap.append(rows([150]), 140); // the live rows have a gap themselves: what lies in it is not here
  expect(gap.upTo(150, 9).map(({ step }) => step)).toEqual([150]);
  expect(gap.at(91)?.step).toBe(91);
  expect(gap.at(120)).toBeUndefined();
});

test("where a token's experts are most of all, unevenness and collapse begin earlier and later", () => {
  expect(healthOf([row(1, [[1600, 800, 800, 800]])], [0], 2)).toMatchObject({ kind: "warn", text: expect.stringMatching(/^Routing is uneven/) });
  expect(healthOf([row(1, [[65, 35]])], [0], 1)?.kind).toBe("good");
  expect(healthOf([row(1, [[76, 24]])], [0], 1)?.kind).toBe("warn");
  expect(healthOf([row(1, [[95, 30]])], [0], 1)?.text).toMatch(/^Routing is uneven/);
  expect(healthOf([row(1, [[95, 5]])], [0], 1)?.text).toMatch(/^Routing has collapsed/);
});

test("live rows of a run that tells rarely begin with the first of them where nothing leads to it", () => {
  const snapshots = new Snapshots();
  snapshots.add(900, 1000, [row(1000, [[1]])]);
  snapshots.append([row(2500, [[1]])], 2001); // 1,001 to 2,000 came by another way
  expect([snapshots.holds(2300), snapshots.at(2300)?.step, snapshots.at(2600)?.step]).toEqual([false, undefined, undefined]);
  snapshots.add(1500, 2499, [row(1500, [[1]]), row(2000, [[1]])]);
  expect([snapshots.at(2300)?.step, snapshots.at(2500)?.step]).toEqual([2000, 2500]);
  const first = new Snapshots();
  first.append([row(500, [[1]])], 1);
  expect(first.at(20)?.step, "before which there is none").toBe(500);
});

test("a window without rows is here all the same, and is not asked for again", () => {
  const snapshots = new Snapshots();
  snapshots.add(1100, 1300, []);
  expect(snapshots.holds(1203)).toBe(true);
  expect(snapshots.at(1203)).toBeUndefined();
  expect(snapshots.holds(1301)).toBe(false);
});

test("pictures are of the last row that told the tensor", () => {
  const bare = (step: number): Snapshot => ({ step, layers: 1, experts: 1, tensors: {} });
  const snapshots = new Snapshots();
  snapshots.add(1, 10, [row(1, [[1]]), bare(2), row(10, [[10]])]);
  snapshots.append([bare(11), bare(12)]);
  const told = (step: number) => snapshots.told(step, "expert_tokens")?.step;
  expect([told(12), told(10), told(9), told(2)]).toEqual([10, 10, 1, 1]);
  expect(snapshots.told(12, "router_prob")).toBeUndefined();
});
