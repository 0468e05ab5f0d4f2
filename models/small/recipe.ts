/**
 * Makes the small model from nothing but the picture packages: `npm install && npm run train` in this folder, after
 * `npm install` in the repository. Killed at any moment, it goes on where it was when started again.
 */

import { existsSync } from 'node:fs';
import { join } from 'node:path';
import type { FloatTensor } from '../../src/tensor/data.ts';
import type { Parameters } from '../../src/training/trainer.ts';
import { finishModel } from './finish.ts';
import { finishAutoencoder, readAll, VAE_FILE, VAE_PREFIX } from './latents.ts';
import { CACHE } from './paths.ts';
import { drawSheet } from './sheet.ts';
import { STAGES, trainTransformer } from './train-transformer.ts';
import { DECODER_STAGE, trainVae, VAE_STAGE } from './train-vae.ts';

await trainVae(VAE_STAGE);
if (!existsSync(VAE_FILE)) await finishAutoencoder();
await trainTransformer();
// The encoder and with it the latents stay; only how they are painted gets better.
await trainVae(DECODER_STAGE, await finishedVae());
await finishModel(STAGES.at(-1)!);
await drawSheet();
console.log(`Done. What lies in ${join(CACHE)} can be deleted.`);

async function finishedVae(): Promise<Parameters> {
  const tensors = await readAll(VAE_FILE);
  return new Map([...tensors].map(([name, tensor]) => [name.slice(VAE_PREFIX.length), tensor as FloatTensor]));
}
