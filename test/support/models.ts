import { resolve } from 'node:path';
import { type Checkpoint, openCheckpoint } from '../../src/weights/checkpoint.ts';
import { fileSource } from '../../src/weights/files.node.ts';

/** The small random checkpoint in the official layout that the golden tensors were computed with. */
export async function goldenCheckpoint(name = 'tiny_sd35'): Promise<Checkpoint> {
  return openCheckpoint([await fileSource(resolve(`test/golden/${name}.safetensors`))]);
}
