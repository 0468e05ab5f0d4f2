/** Sample pictures of a run. */

import { rm } from 'node:fs/promises';
import { join, relative } from 'node:path';
import { writePng } from '../image/files.node.ts';
import { createPipeline } from '../pipeline/pipeline.ts';
import { fileSource } from '../weights/files.node.ts';
import { type Lora, openLora } from '../weights/lora.ts';
import type { DiffusionStage } from './config.ts';
import type { DiffusionWork } from './diffusion.node.ts';
import type { SamplePicture } from './log.ts';
import { type TrainingModel, withFile } from './model.node.ts';
import type { RunContext } from './run-context.node.ts';

/** Draws the sample pictures with the weights of the moment. */
export async function drawSamples(
  { config, folder, runtime }: RunContext,
  model: TrainingModel,
  work: DiffusionWork,
  stage: DiffusionStage,
  step: number,
): Promise<SamplePicture[]> {
  const current = join(folder.samples, '.current');
  const written = await work.write(current);
  let sampled: TrainingModel = { ...model, close: async () => undefined };
  for (const path of written.parts) sampled = await withFile(sampled, path);
  const lora = written.lora === undefined ? undefined : await readLora(written.lora);
  const pipeline = createPipeline({
    checkpoint: sampled,
    runtime,
    tokenizers: model.tokenizers,
    model: { name: config.name, hash: null },
  });
  try {
    const pictures: SamplePicture[] = [];
    const { prompts, steps, cfg } = config.samples!;
    for (const [i, { prompt, negative, size, seed }] of prompts.entries()) {
      const [width, height] = size ?? [pipeline.defaults.width, pipeline.defaults.height];
      const [image] = await pipeline.generate({
        prompt,
        negativePrompt: negative,
        width,
        height,
        steps,
        cfg,
        seed,
        ...(lora && { loras: [{ lora, strength: 1 }] }),
      });
      const file = join(folder.samples, `${stage.name}-${String(step).padStart(6, '0')}-${i + 1}.png`);
      await writePng(file, image!.png());
      pictures.push({ prompt, seed, file: relative(folder.path, file), width, height });
    }
    return pictures;
  } finally {
    await pipeline.dispose();
    await sampled.close();
    await rm(current, { recursive: true, force: true });
  }
}

async function readLora(path: string): Promise<Lora> {
  const source = await fileSource(path);
  try {
    return await openLora(source);
  } finally {
    await source.close();
  }
}
