/** PNG files as lists of chunks, written and taken apart without the code that is tested. */

export interface Chunk {
  readonly type: string;
  readonly data: Uint8Array;
}

export const PNG_SIGNATURE = Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a);

/** The chunks of a valid file. */
export function chunksOf(png: Uint8Array): Chunk[] {
  const chunks: Chunk[] = [];
  const view = new DataView(png.buffer, png.byteOffset);
  for (let at = PNG_SIGNATURE.length; at < png.length; ) {
    const dataEnd = at + 8 + view.getUint32(at);
    const type = Buffer.from(png.subarray(at + 4, at + 8)).toString('latin1');
    chunks.push({ type, data: Uint8Array.from(png.subarray(at + 8, dataEnd)) });
    at = dataEnd + 4;
  }
  return chunks;
}

/** The file of chunks, with the lengths and CRCs that belong to them. */
export function pngOf(chunks: readonly Chunk[]): Uint8Array {
  const parts = chunks.flatMap(({ type, data }) => {
    const typed = Buffer.concat([Buffer.from(type, 'latin1'), data]);
    const sizes = Buffer.alloc(8);
    sizes.writeUInt32BE(data.length, 0);
    sizes.writeUInt32BE(crc32(typed), 4);
    return [sizes.subarray(0, 4), typed, sizes.subarray(4)];
  });
  return Uint8Array.from(Buffer.concat([PNG_SIGNATURE, ...parts]));
}

/** CRC-32 (Node has its own only from 20.15 on). */
const crcs = Int32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  return crc;
});

function crc32(bytes: Uint8Array): number {
  let crc = -1;
  for (const byte of bytes) crc = (crc >>> 8) ^ crcs[(crc ^ byte) & 255]!;
  return ~crc >>> 0;
}
