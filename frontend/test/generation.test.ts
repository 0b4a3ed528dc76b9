import { expect, test } from "vitest";
import { hueOf, visible } from "../src/data/generation";

test("few experts are spread evenly over the hues, many keep their neighbours apart", () => {
  const eight = Array.from({ length: 8 }, (_, expert) => hueOf(expert, 8)).sort((a, b) => a - b);
  for (let i = 1; i < 8; i++) expect(eight[i] - eight[i - 1]).toBe(45);
  for (let expert = 1; expert < 256; expert++) {
    const apart = Math.abs(hueOf(expert, 256) - hueOf(expert - 1, 256));
    expect(Math.min(apart, 360 - apart)).toBeGreaterThan(100);
    expect(hueOf(expert, 256)).toBeLessThan(360);
  }
});

test("white space and what has no text can be seen", () => {
  expect(visible("a\n")).toBe("a↵\n");
  expect(visible("\t")).toBe("⇥\t");
  expect(visible("")).toBe("·");
  expect(visible("<b>")).toBe("<b>");
});
