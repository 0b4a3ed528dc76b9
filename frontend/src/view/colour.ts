/** The routing scale: blue below the fair share, orange above it, quiet at it. Blue and orange stay apart for every common
 *  kind of colour blindness, and lightness falls or rises to both ends, so that the picture also reads in grey. */

export const SIZE = 256;
/** Beyond the scale: an expert without a token, and no data. */
export const DEAD = SIZE;
export const NONE = SIZE + 1;
/** The ends of the scale, as powers of two of the fair share: ×1/4 and ×4. */
export const REACH = 2;

export type Theme = "dark" | "light";
type Lab = [number, number, number];

// OKLab stops from x1/4 to x4.
const STOPS: Record<Theme, string[]> = {
  dark: ["#7cc4ff", "#3b8fe0", "#20507f", "#23272d", "#744319", "#dd7f22", "#ffd08a"],
  light: ["#1d5fae", "#4a92d6", "#a9cdec", "#f1f0ec", "#f2c593", "#dd7d26", "#a34a06"],
};
const DEAD_COLOUR: Record<Theme, string> = { dark: "#000000", light: "#000000" };

const linear = (c: number): number => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
const gamma = (c: number): number => (c <= 0.0031308 ? 12.92 * c : 1.055 * c ** (1 / 2.4) - 0.055);

function toLab(hex: string): Lab {
  const [r, g, b] = [1, 3, 5].map((at) => linear(parseInt(hex.slice(at, at + 2), 16) / 255));
  const l = Math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b);
  const m = Math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b);
  const s = Math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b);
  return [
    0.2104542553 * l + 0.793617785 * m - 0.0040720468 * s,
    1.9779984951 * l - 2.428592205 * m + 0.4505937099 * s,
    0.0259040371 * l + 0.7827717662 * m - 0.808675766 * s,
  ];
}

function toPixel([L, a, b]: Lab): number {
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const rgb = [4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s, -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s, -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s];
  const [red, green, blue] = rgb.map((c) => Math.round(255 * Math.min(Math.max(gamma(c), 0), 1)));
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

const built = new Map<Theme, Uint32Array>();

/** Pixels (ABGR, as `ImageData` lies in memory) for each index of the scale, then DEAD and NONE. */
export function lut(theme: Theme): Uint32Array {
  const held = built.get(theme);
  if (held) return held;
  const stops = STOPS[theme].map(toLab);
  const table = new Uint32Array(SIZE + 2);
  for (let i = 0; i < SIZE; i++) {
    const at = (i / (SIZE - 1)) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    table[i] = toPixel(stops[low].map((c, k) => c + (stops[low + 1][k] - c) * (at - low)) as Lab);
  }
  table[DEAD] = toPixel(toLab(DEAD_COLOUR[theme]));
  built.set(theme, table);
  return table;
}

/** Place on the scale of a ratio to the fair share. */
export function indexOf(ratio: number): number {
  if (ratio === 0) return DEAD;
  if (!(ratio > 0)) return NONE;
  const at = ((Math.log2(ratio) + REACH) / (2 * REACH)) * (SIZE - 1);
  return at <= 0 ? 0 : at >= SIZE - 1 ? SIZE - 1 : Math.round(at);
}

export const cssColour = (theme: Theme, index: number): string => {
  const pixel = lut(theme)[index];
  return `rgb(${pixel & 255} ${(pixel >> 8) & 255} ${(pixel >> 16) & 255})`;
};

export function currentTheme(): Theme {
  const chosen = document.documentElement.dataset.theme;
  if (chosen === "dark" || chosen === "light") return chosen;
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

/** Calls `draw` when the page turns dark or light. */
export function onThemeChange(draw: () => void): void {
  new MutationObserver(draw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
