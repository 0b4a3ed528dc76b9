/** Decodes a `spec.block`: header and typed arrays that view the bytes without a copy. */

export type Numbers = Uint8Array | Uint16Array | Uint32Array | Int32Array | Float32Array | Float64Array;

export interface BlockArray {
  shape: number[];
  data: Numbers;
}

export interface Block {
  header: Record<string, unknown>;
  arrays: Record<string, BlockArray>;
}

export class BlockError extends Error {}

const VIEWS = {
  uint8: Uint8Array,
  uint16: Uint16Array,
  uint32: Uint32Array,
  int32: Int32Array,
  float32: Float32Array,
  float64: Float64Array,
} as const;

interface Listed {
  name: string;
  dtype: keyof typeof VIEWS;
  shape: number[];
  offset: number;
}

const MAGIC = 0x31424c4d; // "MLB1", little-endian
const PREFIX_BYTES = 8;

/** The block in `bytes`. Throws BlockError for anything malformed. */
export function decodeBlock(bytes: ArrayBuffer): Block {
  if (bytes.byteLength < PREFIX_BYTES) throw new BlockError("shorter than a block's prefix");
  const prefix = new DataView(bytes);
  const start = PREFIX_BYTES + prefix.getUint32(4, true);
  if (prefix.getUint32(0, true) !== MAGIC || start % 8 || start > bytes.byteLength) throw new BlockError("not a block");
  const { arrays: listed, ...header } = parseHeader(bytes, start);
  const arrays: Record<string, BlockArray> = {};
  for (const item of listed) arrays[item.name] = viewOf(bytes, start, item);
  return { header, arrays };
}

function parseHeader(bytes: ArrayBuffer, end: number): Record<string, unknown> & { arrays: Listed[] } {
  try {
    const header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(bytes, PREFIX_BYTES, end - PREFIX_BYTES)));
    if (!Array.isArray(header?.arrays)) throw new BlockError("the header lists no arrays");
    return header;
  } catch (error) {
    throw error instanceof BlockError ? error : new BlockError("the header is not JSON");
  }
}

function viewOf(bytes: ArrayBuffer, start: number, item: Listed): BlockArray {
  const view = VIEWS[item.dtype];
  const whole = (n: unknown) => Number.isInteger(n) && (n as number) >= 0;
  if (!view || !Array.isArray(item.shape) || !item.shape.every(whole) || !whole(item.offset) || item.offset % 8) {
    throw new BlockError(`array ${item.name}: bad type, shape or offset`);
  }
  const count = item.shape.reduce((product, n) => product * n, 1);
  if (start + item.offset + count * view.BYTES_PER_ELEMENT > bytes.byteLength) throw new BlockError(`array ${item.name} reaches past the end`);
  return { shape: item.shape, data: new view(bytes, start + item.offset, count) };
}
