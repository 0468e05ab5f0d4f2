/** The autoencoder of the small model, on crops of the pictures over plain colours. */

import { join } from 'node:path';
import { nodeRuntime } from '../../src/runtime/node.node.ts';
import { type TorchGenerator, torchGenerator } from '../../src/sampling/noise.ts';
import { floats } from '../../src/tensor/data.ts';
import { initialValue } from '../../src/training/initial.ts';
import { autoencoderLoss } from '../../src/training/loss.ts';
import { runStage, warmupCosine } from '../../src/training/stage.node.ts';
import { createTrainer, type Parameters, trainableWeights } from '../../src/training/trainer.ts';
import { vaeTensors } from '../../src/weights/expected.ts';
import { VAE } from './configs.ts';
import { BACKGROUNDS } from './data/captions.ts';
import { trainingPairs } from './data/held-out.ts';
import { ALL_OBJECTS } from './data/objects.ts';
import { compose, loadPictures, type PictureSet, pictureAt } from './data/pictures.ts';
import { progressLog } from './log.ts';
import { CACHE } from './paths.ts';

/** Batches by shape and the draw below which each is taken: small crops of the large pictures, whole small pictures, now and then a whole large one. */
const SHAPES = [
  { from: 128, side: 48, items: 8, until: 0.7 },
  { from: 64, side: 64, items: 5, until: 0.9 },
  { from: 128, side: 128, items: 1, until: 1 },
];

/** The pictures by size, and which of them training may see. */
async function trainingPictures() {
  const sets = new Map<number, PictureSet>();
  for (const size of [64, 128]) {
    sets.set(size, await loadPictures({ size, cacheFolder: CACHE, objects: ALL_OBJECTS }));
  }
  return { sets, pairs: trainingPairs(ALL_OBJECTS) };
}

function batch({ sets, pairs }: Awaited<ReturnType<typeof trainingPictures>>, random: TorchGenerator) {
  const draw = random.uniform(1)[0]!;
  const { from, side, items } = SHAPES.find(({ until }) => draw < until)!;
  const image = new Float32Array(items * 3 * side * side);
  const picture = new Float32Array(3 * from * from);
  for (let item = 0; item < items; item++) {
    const pair = pairs[random.integers(0, pairs.length, 1)[0]!]!;
    // Half over the captions' colours, half over any colour, so that the decoder learns more than twelve.
    const named = random.integers(0, 2, 1)[0]! === 0;
    const any = random.integers(0, 256, 3) as [number, number, number];
    const colour = named ? BACKGROUNDS[random.integers(0, BACKGROUNDS.length, 1)[0]!]!.rgb : any;
    compose(pictureAt(sets.get(from)!, pair.objectIndex, pair.styleIndex), colour, picture);
    const [top, left] = random.integers(0, from - side + 1, 2) as [number, number];
    const mirrored = random.integers(0, 2, 1)[0]! === 1;
    for (let channel = 0; channel < 3; channel++) {
      for (let y = 0; y < side; y++) {
        for (let x = 0; x < side; x++) {
          const source = (channel * from + top + y) * from + left + (mirrored ? side - 1 - x : x);
          image[((item * 3 + channel) * side + y) * side + x] = picture[source]!;
        }
      }
    }
  }
  const latent = [items, VAE.latentChannels, side / 8, side / 8];
  return {
    image: floats([items, 3, side, side], image),
    noise: floats(latent, random.normal(latent.reduce((a, b) => a * b))),
  };
}

/** Everything, or only the decoder over a finished encoder, whose latents then stay as they are. */
export interface VaeStage {
  readonly name: string;
  readonly steps: number;
  readonly learningRate: number;
  readonly trains: (name: string) => boolean;
}

export const VAE_STAGE: VaeStage = {
  name: 'vae',
  steps: Number(process.env.VAE_STEPS ?? 5000),
  learningRate: 2e-3,
  trains: () => true,
};
export const DECODER_STAGE: VaeStage = {
  name: 'decoder',
  steps: Number(process.env.DECODER_STEPS ?? 4000),
  learningRate: 1e-3,
  trains: (name) => name.startsWith('decoder.'),
};

/** Trains a stage from the given weights (default: random ones). */
export async function trainVae(stage: VaeStage, from?: Parameters): Promise<void> {
  const random = torchGenerator(1);
  const normal = (count: number) => random.normal(count);
  const values =
    from ?? new Map([...vaeTensors(VAE)].map(([name, shape]) => [name, initialValue(name, shape, normal)]));
  const { loss, pixels, divergence } = autoencoderLoss(VAE, trainableWeights().weights);
  const trainer = await createTrainer(nodeRuntime(), {
    loss,
    metrics: { pixels, divergence },
    values,
    frozen: (name) => !stage.trains(name),
    averageDecay: 0.998,
    optimizer: { weightDecay: 1e-3, beta2: 0.99 },
  });
  const pictures = await trainingPictures();
  await runStage({
    trainer,
    stateFile: join(CACHE, `${stage.name}.state.safetensors`),
    steps: stage.steps,
    batch: (generator) => batch(pictures, generator),
    learningRate: warmupCosine(stage.learningRate, 100, stage.steps),
    onStep: progressLog(stage.name, stage.steps),
  });
  await trainer.dispose();
}
