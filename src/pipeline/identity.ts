/** What a picture's settings call the model it was made with. */

import type { Checkpoint } from '../weights/checkpoint.ts';
import { readExactly } from '../weights/safetensors.ts';

/** The length field that a safetensors file starts with; the mark and version of a GGUF file. */
const START_BYTES = 8;

/** Pieces of each file that are hashed, spread evenly over it, and their length in bytes. */
const SAMPLES = 32;
const SAMPLE_BYTES = 64 * 1024;

/**
 * Names of the files and a SHA-256 over their headers, sizes and samples of their weights: it tells models apart,
 * fine-tuned ones of the same shape, too, without reading gigabytes.
 */
export async function modelIdentity({ files }: Checkpoint): Promise<{ name: string; hash: string }> {
  const pieces: Uint8Array[] = [];
  for (const { source, tensors } of files.toSorted((a, b) => (a.source.name < b.source.name ? -1 : 1))) {
    const dataStart = [...tensors.values()].reduce((start, { offset }) => Math.min(start, offset), source.size);
    const header = await readExactly(source, START_BYTES, dataStart - START_BYTES);
    pieces.push(header, new TextEncoder().encode(`${source.size}\n`));
    const stride = Math.max(Math.floor(source.size / SAMPLES), SAMPLE_BYTES);
    for (let offset = 0; offset < source.size; offset += stride) {
      pieces.push(await readExactly(source, offset, Math.min(SAMPLE_BYTES, source.size - offset)));
    }
  }
  const digest = await crypto.subtle.digest('SHA-256', await new Blob(pieces as BlobPart[]).arrayBuffer());
  const hash = [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, '0')).join('');
  // A path would tell everyone who gets the picture how its maker's folders are named.
  const fileName = (path: string) => path.slice(path.search(/[^/\\]*$/));
  return { name: files.map(({ source }) => fileName(source.name)).join(', '), hash };
}
