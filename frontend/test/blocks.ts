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
