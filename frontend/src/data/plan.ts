/** Which level of detail to ask for, and in which pieces. The server answers with the finest level that fits `points`. */

export const LEVELS = [1, 64, 1024, 16384] as const;
export const POINTS = 2000;

export interface Piece {
  from: number;
  to: number;
}

export interface Plan {
  level: number;
  pieces: Piece[];
}

/** The finest level at which steps `from` … `to` come in at most `maxPieces` answers of POINTS rows. */
export function planFetch(from: number, to: number, maxPieces: number): Plan {
  const steps = Math.max(to - from + 1, 0);
  const level = LEVELS.find((width) => steps <= width * POINTS * maxPieces) ?? LEVELS[LEVELS.length - 1];
  const pieces: Piece[] = [];
  const span = level * POINTS;
  // Pieces begin where buckets begin, so that no bucket is cut in two.
  for (let start = Math.floor((from - 1) / level) * level + 1; start <= to; start += span) {
    pieces.push({ from: Math.max(start, from), to: Math.min(start + span - 1, to) });
  }
  return { level, pieces };
}
