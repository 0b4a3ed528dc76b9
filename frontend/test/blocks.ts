/** The blocks that Python wrote, and blocks made here. */
import { readFileSync } from "node:fs";
import type { Steps } from "../src/data/steps";

export function fixture(name: string): ArrayBuffer {
  const file = readFileSync(new URL(`./fixture/${name}`, import.meta.url));
  return new Uint8Array(file).buffer;
}

/** Rows of one scalar, `loss`, and if `tokens` is given of [step, 1 layer, expert] counts. */
export function rows(steps: number[], loss: number[], options: { level?: number; n?: number[]; tokens?: number[][] } = {}): Steps {
  const values = Float32Array.from(loss);
  const experts = options.tokens?.[0]?.length ?? 0;
  const tensors = options.tokens ? { expert_tokens: { shape: [steps.length, 1, experts], data: Uint32Array.from(options.tokens.flat()) } } : {};
  return {
    run: 1,
    level: options.level ?? 1,
    from: steps[0],
    to: steps[steps.length - 1],
    total: steps.length,
    names: ["loss"],
    moe_layers: [0],
    n_experts: experts,
    top_k: 1,
    count: steps.length,
    step: Uint32Array.from(steps),
    n: Uint32Array.from(options.n ?? steps.map(() => 1)),
    mean: values,
    min: values,
    max: values,
    tensors: tensors as Steps["tensors"],
  };
}

/** The bytes of a level-1 block of those steps, with one scalar, `loss`, and [1 layer, expert] counts. */
export function stepsBlock(steps: number[], loss: number[], tensors: { expert_tokens?: number[][] } = {}): ArrayBuffer {
  const experts = tensors.expert_tokens?.[0]?.length ?? 0;
  const n = steps.length;
  const arrays: [string, string, number[], ArrayBufferView][] = [
    ["step", "uint32", [n], Uint32Array.from(steps)],
    ["n", "uint32", [n], new Uint32Array(n).fill(1)],
    ["scalars", "float32", [n, 1], Float32Array.from(loss)],
    ...(experts ? [["expert_tokens", "uint32", [n, 1, experts], Uint32Array.from(tensors.expert_tokens!.flat())] as [string, string, number[], ArrayBufferView]] : []),
  ];
  const padded = (size: number) => Math.ceil(size / 8) * 8;
  let offset = 0;
  const listed = arrays.map(([name, dtype, shape, { byteLength }]) => {
    const at = offset;
    offset += padded(byteLength);
    return { name, dtype, shape, offset: at };
  });
  const header = { run: 1, level: 1, from: steps[0] ?? 0, to: steps.at(-1) ?? 0, total: n, names: ["loss"], moe_layers: [0], n_experts: experts, top_k: 1, arrays: listed };
  const text = new TextEncoder().encode(JSON.stringify(header));
  const start = 8 + padded(text.length);
  const bytes = new Uint8Array(start + offset).fill(32, 8, start);
  new DataView(bytes.buffer).setUint32(0, 0x31424c4d, true);
  new DataView(bytes.buffer).setUint32(4, start - 8, true);
  bytes.set(text, 8);
  arrays.forEach(([, , , { buffer }], i) => bytes.set(new Uint8Array(buffer as ArrayBuffer), start + listed[i].offset));
  return bytes.buffer;
}
