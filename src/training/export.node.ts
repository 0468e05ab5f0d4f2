/** The finished model of a run, with what it says about its use. */

import { fitPreviewFactors } from '../image/preview.ts';
import { latentOf, loadAutoencoder } from '../models/autoencoder.ts';
import { DEFAULTS_KEY, PREVIEW_KEY } from '../pipeline/defaults.ts';
import type { FloatTensor } from '../tensor/data.ts';
import { allViews, stepRandom, VALIDATION_STREAM } from './batches.ts';
import { stageEntries } from './datasets.node.ts';
import { exportModel, type TrainingModel } from './model.node.ts';
import type { RunContext } from './run-context.node.ts';
import { encodeStage } from './stage-data.node.ts';

/** Latents that the preview's factors are fitted on. */
const PREVIEW_LATENTS = 200;

/** Writes the finished model with what it says about its use. */
export async function exportRun(context: RunContext, model: TrainingModel, path: string): Promise<void> {
  const { config, data, runtime } = context;
  const { precision, defaults } = config.export!;
  const last = config.stages.findLast((stage) => stage.train === 'diffusion');
  const metadata: Record<string, string> = { [DEFAULTS_KEY]: JSON.stringify(defaults) };
  if (last && model.parts.vae) {
    const { training } = stageEntries(data, last.data);
    const random = stepRandom(config.seed, VALIDATION_STREAM);
    const chosen = [...random.permutation(training.length)].slice(0, PREVIEW_LATENTS).map((i) => training[i]!);
    const { encodings, usable } = await encodeStage(context, model, last, { training: chosen, heldOut: [] });
    const vae = loadAutoencoder(runtime, model.parts.vae);
    const latents: FloatTensor[] = [];
    for (const entry of usable.training) {
      const [moments] = await encodings.latents([{ picture: entry.picture, view: allViews(entry)[0]! }]);
      latents.push(latentOf(moments!, model.parts.vae.config));
    }
    const factors = await fitPreviewFactors((latent) => vae.decode(latent), model.parts.vae.config.latentChannels, {
      latents,
    });
    metadata[PREVIEW_KEY] = JSON.stringify(factors);
    await vae.dispose();
    await encodings.dispose();
  }
  await exportModel(model, path, { precision, metadata });
}
