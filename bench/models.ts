/** The models that are measured. */

import { existsSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { MODEL_FILE } from '../models/small/paths.ts';
import { SD35_MEDIUM_TRANSFORMER, type TransformerConfig } from '../src/models/config.ts';
import type { TransformerPass } from '../src/models/transformer.ts';
import { torchGenerator } from '../src/sampling/noise.ts';
import { elementCount, type FloatTensor, floats, type TensorData, toFloat16 } from '../src/tensor/data.ts';
import { type Checkpoint, openCheckpoint, type PartWeights } from '../src/weights/checkpoint.ts';
import { transformerTensors } from '../src/weights/expected.ts';
import { fileSource, writeSafetensorsFile } from '../src/weights/files.node.ts';
import { ROOT } from './support.ts';

/** The small random checkpoint of the tests: all parts, in the official layout. */
export const GOLDEN = join(ROOT, 'test/golden/tiny_sd35.safetensors');
/** The shipped model, where it has been trained. */
export const SMALL = existsSync(MODEL_FILE) ? MODEL_FILE : undefined;

/** The shipped model's transformer (`models/small/train.yaml`) with a table of positions for up to 4096 image tokens. */
export const SMALL_TRANSFORMER: TransformerConfig = {
  ...SD35_MEDIUM_TRANSFORMER,
  hiddenSize: 256,
  depth: 6,
  heads: 4,
  mlpHidden: 1024,
  contextWidth: 192,
  pooledWidth: 192,
  tableSize: 64,
  dualAttentionLayers: [0, 1, 2],
};
/** Half the width and a quarter of the depth of Stable Diffusion 3.5 Medium: about 150 million parameters. */
export const MIDDLE_TRANSFORMER: TransformerConfig = {
  ...SD35_MEDIUM_TRANSFORMER,
  hiddenSize: 768,
  depth: 6,
  heads: 12,
  mlpHidden: 3072,
  tableSize: 64,
  dualAttentionLayers: [0, 1, 2],
};

/** Runs with a checkpoint that is closed afterwards. */
export async function withModel<T>(path: string, work: (checkpoint: Checkpoint) => Promise<T>): Promise<T> {
  const source = await fileSource(path);
  try {
    return await work(await openCheckpoint([source]));
  } finally {
    await source.close();
  }
}

/** Runs with a folder that is removed afterwards. */
export async function withTemporaryFolder<T>(work: (folder: string) => Promise<T>): Promise<T> {
  const folder = await mkdtemp(join(tmpdir(), 'mmditx-bench-'));
  try {
    return await work(folder);
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

/** Random numbers that large weights repeat: drawing each anew would take longer than measuring. */
const POOL = 2 ** 20;
/** Deviation of biases and of the weights of norms around 1. */
const VECTOR_SCALE = 0.1;

/**
 * Runs with the file of a transformer with random weights, which is removed afterwards. They are in half precision, as
 * in the released file. Time does not depend on their values; none is zero, so that a difference between two
 * implementations shows.
 */
export async function withRandomTransformer<T>(
  config: TransformerConfig,
  work: (part: PartWeights<TransformerConfig>, file: string) => Promise<T>,
): Promise<T> {
  return withTemporaryFolder(async (folder) => {
    const file = join(folder, 'transformer.safetensors');
    await writeSafetensorsFile(file, randomTransformer(config));
    return withModel(file, ({ parts }) => work(parts.transformer!, file));
  });
}

function randomTransformer(config: TransformerConfig): Map<string, TensorData> {
  const pool = torchGenerator(1).normal(POOL);
  const tensors = new Map<string, TensorData>();
  let next = 0;
  for (const [name, shape] of transformerTensors(config)) {
    const scale = shape.length === 1 ? VECTOR_SCALE : 1 / Math.sqrt(elementCount(shape.slice(1)));
    const centre = /\.ln_[qk]\.weight$/.test(name) ? 1 : 0;
    const data = new Float32Array(elementCount(shape));
    for (let i = 0; i < data.length; i++) data[i] = centre + scale * pool[next++ % POOL]!;
    tensors.set(`model.diffusion_model.${name}`, { dtype: 'float16', shape, data: toFloat16(data) });
  }
  return tensors;
}

/** Standard normal values, the same at every run. */
export function normalFloats(shape: readonly number[], seed = 1): FloatTensor {
  return floats(shape, torchGenerator(seed).normal(elementCount(shape)));
}

export interface TransformerInputs extends TransformerPass {
  readonly latent: FloatTensor;
  readonly timesteps: readonly number[];
}

/** Random inputs for a square of `tokens` image tokens and `length` context tokens. */
export function transformerInputs(config: TransformerConfig, tokens: number, length: number): TransformerInputs {
  const side = Math.sqrt(tokens) * config.patchSize;
  return {
    latent: normalFloats([1, config.inChannels, side, side], 1),
    timesteps: [500],
    context: normalFloats([1, length, config.contextWidth], 2),
    pooled: normalFloats([1, config.pooledWidth], 3),
  };
}
