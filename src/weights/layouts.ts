/** From the tensors of a file to weights under the names that the networks know, whatever layout the file has. */

import { quantizedWeights } from './quantized.ts';
import { type WeightsFile, type WeightTensor, wholeTensor } from './stored.ts';

/** The weights of a file by their names in the official layout, with the file's own prefixes. */
export async function officialWeights(file: WeightsFile): Promise<Map<string, WeightTensor>> {
  const weights = new Map<string, WeightTensor>();
  for (const [name, tensor] of file.tensors) weights.set(name, wholeTensor(file, tensor));
  return quantizedWeights(weights);
}
