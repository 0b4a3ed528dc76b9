import { expect, test } from "vitest";
import { BlockError, decodeBlock } from "../src/data/block";
import { decodeSteps } from "../src/data/steps";
import { fixture } from "./blocks";

test("decodes what Python wrote, without copying", () => {
  const bytes = fixture("steps.bin");
  const steps = decodeSteps(bytes);
  expect(steps.names).toEqual(["loss", "max_vio"]);
  expect([...steps.step]).toEqual([1, 2, 3]);
  expect([...steps.mean].map((v) => (Number.isNaN(v) ? "nan" : v))).toEqual([4, 0.5, 3, "nan", 2, 1.5]);
  expect(steps.min).toBe(steps.mean);
  expect(steps.tensors.expert_tokens.shape).toEqual([3, 2, 4]);
  expect(steps.tensors.expert_tokens.data.buffer).toBe(bytes);
});

test("decodes roll-ups with their least, greatest and mean", () => {
  const steps = decodeSteps(fixture("rollup.bin"));
  expect([steps.level, steps.count, steps.n[0]]).toEqual([64, 1, 3]);
  expect([steps.min[0], steps.max[0], steps.mean[0]]).toEqual([2, 4, 3]);
  expect(steps.tensors.expert_tokens.data).toBeInstanceOf(Float64Array);
});

test("refuses every truncation of a block", () => {
  const bytes = fixture("steps.bin");
  for (let size = 0; size < bytes.byteLength - 8; size += 7) expect(() => decodeBlock(bytes.slice(0, size))).toThrow(BlockError);
});

test("refuses another magic, and arrays that reach past the end", () => {
  const wrong = fixture("steps.bin");
  new Uint8Array(wrong)[0] = 0;
  expect(() => decodeBlock(wrong)).toThrow(BlockError);
  const text = JSON.stringify({ arrays: [{ name: "x", dtype: "float64", shape: [1e9], offset: 0 }] }).padEnd(80, " ");
  const bytes = new Uint8Array(8 + 80 + 8);
  bytes.set(new TextEncoder().encode("MLB1"));
  new DataView(bytes.buffer).setUint32(4, 80, true);
  bytes.set(new TextEncoder().encode(text), 8);
  expect(() => decodeBlock(bytes.buffer)).toThrow(/past the end/);
});
