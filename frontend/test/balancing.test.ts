import { expect, test } from "vitest";
import { Series } from "../src/data/series";
import type { Snapshot } from "../src/data/snapshot";
import { RunStore } from "../src/data/store";
import { termRows } from "../src/data/terms";
import type { Run } from "../src/data/types";
import { layersAt } from "../src/view/balancing";
import { rows } from "./blocks";

const TERMS = ["switch_aux", "z_loss"];

/** Two steps of a model with `layers` layers: the value of term n in layer l at step s is 100 s + 10 l + n. */
function block(steps: number[], layers: number) {
  const values = steps.flatMap((step) => Array.from({ length: layers }, (_, l) => TERMS.map((_, n) => 100 * step + 10 * l + n)).flat());
  const made = rows(steps, steps.map(() => 0));
  made.tensors.balance_loss = { shape: [steps.length, layers, TERMS.length], data: Float32Array.from(values) };
  return made;
}

test("one layer's terms are taken from blocks of every layer and of that one alone", () => {
  const all = new Series();
  all.apply(termRows(block([1, 2], 3), 2, TERMS)!);
  expect([...all.view("switch_aux")!.mean]).toEqual([120, 220]);
  expect([...all.view("z_loss")!.mean]).toEqual([121, 221]);
  expect([...termRows(block([1], 1), 2, TERMS)!.mean]).toEqual([100, 101]);
  expect(termRows(rows([1], [0]), 0, TERMS)).toBeNull();
  expect(termRows(block([1], 1), 0, ["switch_aux"])).toBeNull();
});

test("live rows lengthen the chosen layer's terms, and another layer begins anew", () => {
  const store = new RunStore({ id: 1, attempt: 1, metric_names: [], moe_layers: [0, 1], experts: 2, balance_terms: TERMS } as unknown as Run);
  store.setLayer(1);
  store.terms = new Series();
  store.applySteps(block([1], 2));
  store.applySteps(block([2], 2));
  expect([...store.terms!.view("z_loss")!.mean]).toEqual([111, 211]);
  store.setLayer(0);
  expect(store.terms).toBeNull();
});

test("the table has a row for each layer with its terms, entropy, drops and the range of the bias", () => {
  const tensors = {
    expert_tokens: Uint32Array.from([3, 5, 8, 0]),
    dropped: Uint32Array.from([0, 0, 2, 0]),
    balance_loss: Float32Array.from([1, 2, 3, 4]),
    router_entropy: Float32Array.from([0.5, 0.25]),
    expert_bias: Float32Array.from([0.5, -0.5, 0, 1]),
  };
  const snapshot: Snapshot = { step: 1, layers: 2, experts: 2, tensors };
  const { head, rows: found } = layersAt(snapshot, [3, 5], TERMS);
  expect(head).toEqual(["layer", "switch_aux", "z_loss", "router entropy", "dropped", "bias"]);
  expect(found).toEqual([
    ["3", "1", "2", "0.5 nats", "0", "-0.5 … 0.5"],
    ["5", "3", "4", "0.25 nats", "2 (25.0 %)", "0 … 1"],
  ]);
  const bare = layersAt({ ...snapshot, tensors: { expert_tokens: tensors.expert_tokens } }, [], []);
  expect(bare.head).toEqual(["layer", "router entropy", "dropped"]);
  expect(bare.rows[1]).toEqual(["1", "–", "–"]);
});
