/** Opening weight files of any format, told by their first bytes. */

import { MmditxError } from '../errors.ts';
import { openGguf } from './gguf.ts';
import { officialName } from './gguf-names.ts';
import { quote } from './quote.ts';
import { type ByteSource, openSafetensors } from './safetensors.ts';
import type { StoredTensor, WeightsFile } from './stored.ts';

const GGUF_MARK = 'GGUF';

/**
 * Reads and checks the header of a safetensors or GGUF file.
 * @throws MmditxError `bad-file` with what is wrong; `unsupported-model` for a format that is not read
 */
export async function openWeightsFile(source: ByteSource): Promise<WeightsFile> {
  const mark = await source.read(0, Math.min(GGUF_MARK.length, source.size));
  if (String.fromCharCode(...mark) === GGUF_MARK) return openGgufWeights(source);
  const { metadata, tensors } = await openSafetensors(source);
  return {
    source,
    metadata,
    tensors: new Map([...tensors].map(([name, { dtype, ...info }]) => [name, { ...info, encoding: dtype }])),
  };
}

async function openGgufWeights(source: ByteSource): Promise<WeightsFile> {
  const { metadata, tensors } = await openGguf(source);
  const texts = [...metadata].filter((entry): entry is [string, string] => typeof entry[1] === 'string');
  const named = new Map<string, StoredTensor>();
  for (const [name, tensor] of tensors) {
    const official = officialName(name);
    if (named.has(official)) {
      throw new MmditxError(
        'bad-file',
        `${source.name} holds ${quote(official)} twice, once as ${quote(name)}; convert the model again.`,
      );
    }
    // Some writers drop leading axes of size 1.
    const isTable = /(?:^|\.)pos_embed$/.test(official) && tensor.shape.length === 2;
    named.set(official, isTable ? { ...tensor, shape: [1, ...tensor.shape] } : tensor);
  }
  return { source, metadata: Object.fromEntries(texts), tensors: named };
}
