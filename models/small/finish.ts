/** Puts the trained parts into one file in the official layout, in half precision, with tokenizers and settings. */

import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { fitPreviewFactors, type PreviewFactors } from '../../src/image/preview.ts';
import { openFiles } from '../../src/index.node.ts';
import { loadAutoencoder } from '../../src/models/autoencoder.ts';
import { batchItems } from '../../src/models/batches.ts';
import type { DefaultOverrides } from '../../src/pipeline/defaults.ts';
import { DEFAULTS_KEY, PREVIEW_KEY } from '../../src/pipeline/defaults.ts';
import { nodeRuntime } from '../../src/runtime/node.node.ts';
import { type TensorData, toFloat16, toFloat32 } from '../../src/tensor/data.ts';
import { positionTable } from '../../src/training/initial.ts';
import { writeSafetensorsFile } from '../../src/weights/files.node.ts';
import { CLIP_TOKENIZER_KEY, configMetadata, T5_TOKENIZER_KEY } from '../../src/weights/metadata.ts';
import { prepareTexts } from './captions-to-ids.ts';
import { TRANSFORMER, VAE } from './configs.ts';
import { latentsOf, readAll, VAE_FILE, VAE_PREFIX } from './latents.ts';
import { CACHE, MODEL_FILE } from './paths.ts';
import { GRID, PREFIXES, type Stage, stateFile } from './train-transformer.ts';
import { DECODER_STAGE } from './train-vae.ts';

/** What a newcomer gets without any option: the size the model was trained at, in seconds on two cores. */
const DEFAULTS: DefaultOverrides = {
  width: 128,
  height: 128,
  steps: 28,
  cfg: 4,
  skipLayers: [2],
};

/**
 * Writes the model file.
 * @param stage the transformer stage whose averaged weights are taken
 * @param path default: where the package ships it
 */
export async function finishModel(stage: Stage, path = MODEL_FILE): Promise<void> {
  const texts = prepareTexts();
  const tensors = new Map<string, TensorData>();
  const put = (name: string, tensor: TensorData) =>
    tensors.set(name, { dtype: 'float16', shape: tensor.shape, data: toFloat16(toFloat32(tensor)) });

  put(`${PREFIXES.transformer}.pos_embed`, positionTable(TRANSFORMER, GRID));
  for (const [name, tensor] of await averages(stateFile(stage))) put(name, tensor);
  for (const [name, tensor] of await readAll(VAE_FILE)) put(name, tensor);
  // The refined decoder, once its stage has begun.
  const decoderState = join(CACHE, `${DECODER_STAGE.name}.state.safetensors`);
  const decoder = existsSync(decoderState) ? await averages(decoderState) : [];
  for (const [name, tensor] of decoder) put(`${VAE_PREFIX}${name}`, tensor);

  const metadata = {
    format: 'pt',
    ...configMetadata({ transformer: TRANSFORMER, vae: VAE, clipL: texts.clipL, clipG: texts.clipG, t5: texts.t5 }),
    [DEFAULTS_KEY]: JSON.stringify(DEFAULTS),
    [CLIP_TOKENIZER_KEY]: texts.tokenizers.clip,
    [T5_TOKENIZER_KEY]: texts.tokenizers.t5,
  };
  await writeSafetensorsFile(path, tensors, metadata);
  await writeSafetensorsFile(path, tensors, { ...metadata, [PREVIEW_KEY]: JSON.stringify(await previewFactors(path)) });
}

/** How latents of pictures look, for previews while sampling. */
async function previewFactors(path: string): Promise<PreviewFactors> {
  const { checkpoint, close } = await openFiles([path]);
  const vae = loadAutoencoder(nodeRuntime(), checkpoint.parts.vae!);
  const all = await latentsOf(64);
  const latents = Array.from({ length: PREVIEW_SAMPLE }, (_, i) =>
    batchItems(all, Math.floor((i * all.shape[0]!) / PREVIEW_SAMPLE), 1),
  );
  const factors = await fitPreviewFactors((latent) => vae.decode(latent), VAE.latentChannels, { latents });
  await vae.dispose();
  await close();
  return factors;
}
/** Pictures the preview is fitted on. */
const PREVIEW_SAMPLE = 200;

/** The averaged parameters in a training state. */
async function averages(path: string): Promise<Map<string, TensorData>> {
  const prefix = 'average.';
  const state = await readAll(path);
  return new Map(
    [...state].flatMap(([key, tensor]) => (key.startsWith(prefix) ? [[key.slice(prefix.length), tensor]] : [])),
  );
}
