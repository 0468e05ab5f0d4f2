/** What a picture's settings call the model it was made with. */

import type { Checkpoint } from '../weights/checkpoint.ts';
import { readExactly } from '../weights/safetensors.ts';

/** The length field that a safetensors file starts with. */
const LENGTH_BYTES = 8;

/**
 * Names of the files and a SHA-256 over their headers and sizes: it tells models of different shape or metadata apart
 * without reading gigabytes of weights.
 */
export async function modelIdentity({ files }: Checkpoint): Promise<{ name: string; hash: string }> {
  const pieces: Uint8Array[] = [];
  for (const { source } of files) {
    const start = await readExactly(source, 0, LENGTH_BYTES);
    const length = Number(new DataView(start.buffer, start.byteOffset).getBigUint64(0, true));
    pieces.push(await readExactly(source, LENGTH_BYTES, length), new TextEncoder().encode(`${source.size}\n`));
  }
  const digest = await crypto.subtle.digest('SHA-256', await new Blob(pieces as BlobPart[]).arrayBuffer());
  const hash = [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, '0')).join('');
  return { name: files.map(({ source }) => source.name).join(', '), hash };
}
