/**
 * The block formats of ggml: some values share a scale, their integers are packed to 2 to 8 bits.
 * Layouts and arithmetic are those of ggml's reference (`ggml-quants.c`, the `dequantize_row_*` functions). Scales are
 * half precision and integers short, so that every product here is exact and only the stored sum is rounded.
 */

import { toFloat32 } from '../tensor/data.ts';

export type BlockType = 'q8_0' | 'q4_0' | 'q4_1' | 'q5_0' | 'q5_1' | 'q2_k' | 'q3_k' | 'q4_k' | 'q5_k' | 'q6_k';

export interface BlockFormat {
  readonly valuesPerBlock: number;
  readonly bytesPerBlock: number;
}

/** Values in a block of the plain formats (ggml's QK8_0, QK4_0 and so on). */
const PLAIN = 32;
/** Values in a superblock of the K formats, which has a scale for every 16 or 32 of them (ggml's QK_K). */
const SUPER = 256;

export const blockFormats: Readonly<Record<BlockType, BlockFormat>> = {
  q8_0: { valuesPerBlock: PLAIN, bytesPerBlock: 34 },
  q4_0: { valuesPerBlock: PLAIN, bytesPerBlock: 18 },
  q4_1: { valuesPerBlock: PLAIN, bytesPerBlock: 20 },
  q5_0: { valuesPerBlock: PLAIN, bytesPerBlock: 22 },
  q5_1: { valuesPerBlock: PLAIN, bytesPerBlock: 24 },
  q2_k: { valuesPerBlock: SUPER, bytesPerBlock: 84 },
  q3_k: { valuesPerBlock: SUPER, bytesPerBlock: 110 },
  q4_k: { valuesPerBlock: SUPER, bytesPerBlock: 144 },
  q5_k: { valuesPerBlock: SUPER, bytesPerBlock: 176 },
  q6_k: { valuesPerBlock: SUPER, bytesPerBlock: 210 },
};

/**
 * Writes the values of whole blocks to `out`, from `outOffset` (default 0) on.
 * @throws RangeError when `bytes` end inside a block or `out` is too short
 */
export function decodeBlocks(type: BlockType, bytes: Uint8Array, out: Float32Array, outOffset = 0): void {
  const { valuesPerBlock, bytesPerBlock } = blockFormats[type];
  const blocks = bytes.length / bytesPerBlock;
  if (!Number.isInteger(blocks)) throw new RangeError(`${bytes.length} bytes are not whole blocks of ${type}.`);
  if (outOffset < 0 || outOffset + blocks * valuesPerBlock > out.length) {
    throw new RangeError(`${blocks * valuesPerBlock} values from ${outOffset} on do not fit into ${out.length}.`);
  }
  decoders[type](bytes, out, outOffset, halves());
}

/** Writes the values of `bytes` to `out` from `at` on; `half` has the number for each half precision bit pattern. */
type Decoder = (bytes: Uint8Array, out: Float32Array, at: number, half: Float32Array) => void;

const decoders: Readonly<Record<BlockType, Decoder>> = {
  /** Scale, 32 signed bytes. */
  q8_0(bytes, out, at, half) {
    const signed = new Int8Array(bytes.buffer, bytes.byteOffset, bytes.length);
    for (let block = 0; block < bytes.length; block += 34) {
      const scale = half[bytes[block]! | (bytes[block + 1]! << 8)]!;
      for (let i = block + 2; i < block + 34; i++) out[at++] = signed[i]! * scale;
    }
  },

  /** Scale, 16 bytes whose low halves are the first 16 values and whose high halves the others; 8 stands for zero. */
  q4_0(bytes, out, at, half) {
    for (let block = 0; block < bytes.length; block += 18, at += 32) {
      const scale = half[bytes[block]! | (bytes[block + 1]! << 8)]!;
      for (let i = 0; i < 16; i++) {
        const pair = bytes[block + 2 + i]!;
        out[at + i] = ((pair & 15) - 8) * scale;
        out[at + 16 + i] = ((pair >> 4) - 8) * scale;
      }
    }
  },

  /** As q4_0, with a smallest value behind the scale in place of the fixed zero. */
  q4_1(bytes, out, at, half) {
    for (let block = 0; block < bytes.length; block += 20, at += 32) {
      const scale = half[bytes[block]! | (bytes[block + 1]! << 8)]!;
      const least = half[bytes[block + 2]! | (bytes[block + 3]! << 8)]!;
      for (let i = 0; i < 16; i++) {
        const pair = bytes[block + 4 + i]!;
        out[at + i] = (pair & 15) * scale + least;
        out[at + 16 + i] = (pair >> 4) * scale + least;
      }
    }
  },

  /** As q4_0, with 32 fifth bits, the first value's lowest, before the bytes; 16 stands for zero. */
  q5_0(bytes, out, at, half) {
    for (let block = 0; block < bytes.length; block += 22, at += 32) {
      const scale = half[bytes[block]! | (bytes[block + 1]! << 8)]!;
      const first = bytes[block + 2]! | (bytes[block + 3]! << 8);
      const second = bytes[block + 4]! | (bytes[block + 5]! << 8);
      for (let i = 0; i < 16; i++) {
        const pair = bytes[block + 6 + i]!;
        out[at + i] = ((pair & 15) + ((first >> i) & 1) * 16 - 16) * scale;
        out[at + 16 + i] = ((pair >> 4) + ((second >> i) & 1) * 16 - 16) * scale;
      }
    }
  },

  /** As q4_1, with fifth bits as in q5_0. */
  q5_1(bytes, out, at, half) {
    for (let block = 0; block < bytes.length; block += 24, at += 32) {
      const scale = half[bytes[block]! | (bytes[block + 1]! << 8)]!;
      const least = half[bytes[block + 2]! | (bytes[block + 3]! << 8)]!;
      const first = bytes[block + 4]! | (bytes[block + 5]! << 8);
      const second = bytes[block + 6]! | (bytes[block + 7]! << 8);
      for (let i = 0; i < 16; i++) {
        const pair = bytes[block + 8 + i]!;
        out[at + i] = ((pair & 15) + ((first >> i) & 1) * 16) * scale + least;
        out[at + 16 + i] = ((pair >> 4) + ((second >> i) & 1) * 16) * scale + least;
      }
    }
  },

  /**
   * 16 bytes of scales (low half) and minima (high half), 64 bytes of 4 values, scale of the scales, of the minima.
   * 32 bytes hold 128 values: their lowest two bits the first 32, the next bits the next 32, each half of which has a
   * scale. Minima are subtracted.
   */
  q2_k(bytes, out, at, half) {
    for (let block = 0; block < bytes.length; block += 84) {
      const scale = half[bytes[block + 80]! | (bytes[block + 81]! << 8)]!;
      const minimum = half[bytes[block + 82]! | (bytes[block + 83]! << 8)]!;
      for (let group = 0; group < 16; group++) {
        const step = scale * (bytes[block + group]! & 15);
        const below = minimum * (bytes[block + group]! >> 4);
        const q = block + 16 + (group >> 3) * 32 + (group & 1) * 16;
        const shift = ((group >> 1) & 3) * 2;
        for (let i = q; i < q + 16; i++) out[at++] = ((bytes[i]! >> shift) & 3) * step - below;
      }
    }
  },

  /**
   * 32 bytes of third bits, 64 bytes of 4 values as in q2_k, 12 bytes of scales of 6 bits, their scale. A third bit
   * that is not set subtracts 4. 32 stands for a scale of zero; the scales' low 4 bits are in 8 bytes (low halves
   * first), their high 2 bits in the 4 bytes behind, one pair of bits after the other.
   */
  q3_k(bytes, out, at, half) {
    for (let block = 0; block < bytes.length; block += 110) {
      const scale = half[bytes[block + 108]! | (bytes[block + 109]! << 8)]!;
      for (let group = 0; group < 16; group++) {
        const low = (bytes[block + 96 + (group & 7)]! >> ((group >> 3) << 2)) & 15;
        const high = (bytes[block + 104 + (group & 3)]! >> ((group >> 2) << 1)) & 3;
        const step = scale * ((low | (high << 4)) - 32);
        const third = block + (group & 1) * 16;
        const q = block + 32 + (group >> 3) * 32 + (group & 1) * 16;
        const bit = group >> 1;
        const shift = (bit & 3) * 2;
        for (let i = 0; i < 16; i++) {
          out[at++] = (((bytes[q + i]! >> shift) & 3) + ((bytes[third + i]! >> bit) & 1) * 4 - 4) * step;
        }
      }
    }
  },

  /**
   * Scale of the scales and of the minima, 12 bytes of both (`groupScale`, `groupMinimum`), 128 bytes of 2 values:
   * the low halves of 32 bytes are one group of 32 values, the high halves the next. Minima are subtracted.
   */
  q4_k(bytes, out, at, half) {
    for (let block = 0; block < bytes.length; block += 144) {
      const scale = half[bytes[block]! | (bytes[block + 1]! << 8)]!;
      const minimum = half[bytes[block + 2]! | (bytes[block + 3]! << 8)]!;
      for (let group = 0; group < 8; group++) {
        const step = scale * groupScale(bytes, block + 4, group);
        const below = minimum * groupMinimum(bytes, block + 4, group);
        const q = block + 16 + (group >> 1) * 32;
        const shift = (group & 1) * 4;
        for (let i = q; i < q + 32; i++) out[at++] = ((bytes[i]! >> shift) & 15) * step - below;
      }
    }
  },

  /** As q4_k, with 32 bytes of fifth bits before the values, the lowest of each byte for the first group. */
  q5_k(bytes, out, at, half) {
    for (let block = 0; block < bytes.length; block += 176) {
      const scale = half[bytes[block]! | (bytes[block + 1]! << 8)]!;
      const minimum = half[bytes[block + 2]! | (bytes[block + 3]! << 8)]!;
      const fifth = block + 16;
      for (let group = 0; group < 8; group++) {
        const step = scale * groupScale(bytes, block + 4, group);
        const below = minimum * groupMinimum(bytes, block + 4, group);
        const q = block + 48 + (group >> 1) * 32;
        const shift = (group & 1) * 4;
        for (let i = 0; i < 32; i++) {
          out[at++] = (((bytes[q + i]! >> shift) & 15) + ((bytes[fifth + i]! >> group) & 1) * 16) * step - below;
        }
      }
    }
  },

  /**
   * 128 bytes of low 4 bits, 64 bytes of high 2 bits, 16 signed bytes of scales, their scale; 32 stands for zero.
   * 64 bytes of low bits are 128 values, the low halves first; 32 bytes of high bits are the same 128.
   */
  q6_k(bytes, out, at, half) {
    const signed = new Int8Array(bytes.buffer, bytes.byteOffset, bytes.length);
    for (let block = 0; block < bytes.length; block += 210) {
      const scale = half[bytes[block + 208]! | (bytes[block + 209]! << 8)]!;
      for (let group = 0; group < 16; group++) {
        const step = scale * signed[block + 192 + group]!;
        const low = block + (group >> 3) * 64 + (group & 3) * 16;
        const lowShift = group & 4;
        const high = block + 128 + (group >> 3) * 32 + (group & 1) * 16;
        const highShift = group & 6;
        for (let i = 0; i < 16; i++) {
          out[at++] = (((bytes[low + i]! >> lowShift) & 15) + ((bytes[high + i]! >> highShift) & 3) * 16 - 32) * step;
        }
      }
    }
  },
};

/**
 * The scale, 0 to 63, of a group of q4_k and q5_k. Scales and minima of the first 4 groups are the low 6 bits of
 * 4 bytes each; those of the others are the halves of the last 4 bytes and, above them, the top bits of the first.
 */
function groupScale(bytes: Uint8Array, at: number, group: number): number {
  return group < 4 ? bytes[at + group]! & 63 : (bytes[at + 4 + group]! & 15) | ((bytes[at + group - 4]! >> 6) << 4);
}

function groupMinimum(bytes: Uint8Array, at: number, group: number): number {
  return group < 4 ? bytes[at + 4 + group]! & 63 : (bytes[at + 4 + group]! >> 4) | ((bytes[at + group]! >> 6) << 4);
}

let halfTable: Float32Array | undefined;

/** The numbers of all half precision bit patterns. */
function halves(): Float32Array {
  halfTable ??= toFloat32({
    dtype: 'float16',
    shape: [0x10000],
    data: Uint16Array.from({ length: 0x10000 }, (_, bits) => bits),
  });
  return halfTable;
}
