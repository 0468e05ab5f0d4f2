import { CLIP_G, CLIP_L, SD3_VAE, SD35_MEDIUM_TRANSFORMER, T5_XXL } from '../../src/models/config.ts';
import { DEFAULTS_KEY } from '../../src/pipeline/defaults.ts';
import { torchGenerator } from '../../src/sampling/noise.ts';
import type { TensorData } from '../../src/tensor/data.ts';
import { clipTokenizer } from '../../src/text/tokenizer.ts';
import { initialValue, positionTable } from '../../src/training/initial.ts';
import { trainClipTokenizer, trainT5Tokenizer } from '../../src/training/tokenizer-training.ts';
import { clipTensors, t5Tensors, transformerTensors, vaeTensors } from '../../src/weights/expected.ts';
import { writeSafetensorsFile } from '../../src/weights/files.node.ts';
import { CLIP_TOKENIZER_KEY, configMetadata, T5_TOKENIZER_KEY } from '../../src/weights/metadata.ts';

const CAPTIONS = ['a red fox on a blue background', 'a green tree', 'two cats and a dog', 'a house by the sea'];

export interface TinyModelOptions {
  /** Leaves tensors out, by the start of their names. */
  without?: string;
  /** Puts a NaN into the tensor of this name. */
  broken?: string;
  /** Side in pixels of pictures whose size is not given (default 32). */
  side?: number;
}

/** Writes a whole checkpoint of random weights, tokenizers included, that draws small pictures of noise in a moment. */
export async function writeTinyModel(
  path: string,
  { without, broken, side = 32 }: TinyModelOptions = {},
): Promise<void> {
  const clipJson = trainClipTokenizer(CAPTIONS, { vocabularySize: 600 });
  const t5Json = trainT5Tokenizer(CAPTIONS, { vocabularySize: 200 });
  const vocabSize = clipTokenizer(clipJson).end + 1;
  const clip = { width: 64, pooledWidth: 64, layers: 2, heads: 1, mlpWidth: 64, vocabSize, positions: 16 };
  const ends = { bosId: vocabSize - 2, eosId: vocabSize - 1 };
  const clipL = { ...CLIP_L, ...clip, ...ends, padId: vocabSize - 1 };
  // Wider than CLIP-L, as shapes tell the two apart.
  const clipG = { ...CLIP_G, ...clip, ...ends, width: 128, heads: 2, pooledWidth: 128 };
  const t5 = { ...T5_XXL, width: 192, layers: 1, heads: 3, mlpWidth: 64, vocabSize: 200, tokens: 16 };
  const transformer = {
    ...SD35_MEDIUM_TRANSFORMER,
    hiddenSize: 64,
    depth: 3,
    heads: 1,
    mlpHidden: 64,
    contextWidth: 192,
    pooledWidth: 192,
    tableSize: 8,
    dualAttentionLayers: [0],
  };
  const vae = { ...SD3_VAE, channels: 32, multipliers: [1, 1, 1, 1], resBlocks: 1 };

  const random = torchGenerator(5);
  const tensors = new Map<string, TensorData>();
  const lists = {
    'model.diffusion_model': transformerTensors(transformer),
    first_stage_model: vaeTensors(vae),
    'text_encoders.clip_l.transformer': clipTensors(clipL),
    'text_encoders.clip_g.transformer': clipTensors(clipG),
    'text_encoders.t5xxl.transformer': t5Tensors(t5),
  };
  for (const [prefix, shapes] of Object.entries(lists)) {
    for (const [name, shape] of shapes) {
      const key = `${prefix}.${name}`;
      if (without && key.startsWith(without)) continue;
      // Not zero as training begins with, so that every weight matters to the picture.
      const plain = name.replace(/adaLN_modulation|final_layer/, 'layer');
      tensors.set(
        key,
        initialValue(plain, shape, (count) => random.normal(count)),
      );
    }
  }
  tensors.set('model.diffusion_model.pos_embed', positionTable(transformer, { grid: 4, span: 4 }));
  if (broken) (tensors.get(broken)!.data as Float32Array)[1] = Number.NaN;
  await writeSafetensorsFile(path, tensors, {
    ...configMetadata({ transformer, vae, clipL, clipG, t5 }),
    [CLIP_TOKENIZER_KEY]: clipJson,
    [T5_TOKENIZER_KEY]: t5Json,
    [DEFAULTS_KEY]: JSON.stringify({ width: side, height: side, steps: 4, cfg: 3, skipLayers: [1] }),
  });
}
