/**
 * From the tensors of files to weights under the names that the networks know, whatever layout the files have. What
 * describes a weight stands beside it in the same file; the rest can be told of a whole network only.
 */

import { officialTransformer, officialVae } from './diffusers.ts';
import { quantizedWeights } from './quantized.ts';
import { scaledWeights } from './scaled-fp8.ts';
import type { WeightsFile, WeightTensor } from './stored.ts';

/**
 * The weights of a file by its own names, joined with the scales beside them.
 * @throws MmditxError `bad-file`, `unsupported-model` for scales that cannot be applied
 */
export async function fileWeights(file: WeightsFile): Promise<Map<string, WeightTensor>> {
  return quantizedWeights(await scaledWeights(file));
}

/** Networks as they can be told by names. */
export type NetworkKind = 'transformer' | 'vae' | 'clip' | 't5';

/** The weights of a network, of all its files, by the official names without a prefix. */
export function officialNames(
  kind: NetworkKind,
  tensors: ReadonlyMap<string, WeightTensor>,
): ReadonlyMap<string, WeightTensor> {
  if (kind === 'transformer') return officialTransformer(tensors);
  if (kind === 'vae') return officialVae(tensors);
  // diffusers has the encoders as Transformers names them, and so have the official files.
  return tensors;
}
