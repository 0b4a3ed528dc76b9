import { describe, expect, it } from "vitest";
import { matches } from "../src/view/filter";

describe("a filter", () => {
  it("wants every word, in any order and case", () => {
    expect(matches("Nano DeepSeek-V3 latent attention", "deepseek NANO")).toBe(true);
    expect(matches("Nano DeepSeek-V3 latent attention", "deepseek switch")).toBe(false);
  });
  it("leaves everything where nothing is asked", () => {
    expect(matches("anything", "  ")).toBe(true);
  });
});
