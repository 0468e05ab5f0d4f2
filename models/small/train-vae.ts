/** First stage of the small model's recipe: the autoencoder, on crops of the pictures over plain colours. */

import { join } from 'node:path';
import { nodeRuntime } from '../../src/runtime/node.node.ts';
import { type TorchGenerator, torchGenerator } from '../../src/sampling/noise.ts';
import { floats } from '../../src/tensor/data.ts';
import { initialValue } from '../../src/training/initial.ts';
import { autoencoderLoss } from '../../src/training/loss.ts';
import { runStage, warmupCosine } from '../../src/training/stage.node.ts';
import { createTrainer, trainableWeights } from '../../src/training/trainer.ts';
import { vaeTensors } from '../../src/weights/expected.ts';
import { VAE } from './configs.ts';
import { BACKGROUNDS } from './data/captions.ts';
import { trainingPairs } from './data/held-out.ts';
import { compose, loadPictures, pictureAt, type PictureSet } from './data/pictures.ts';
import { progressLog } from './log.ts';
import { CACHE } from './paths.ts';

const STEPS = Number(process.env.VAE_STEPS ?? 9000);
/** Batches by side: small crops of the large pictures, whole small pictures, now and then a whole large one. */
const SHAPES = [
  { from: 128, side: 48, items: 8, share: 0.7 },
  { from: 64, side: 64, items: 5, share: 0.2 },
  { from: 128, side: 128, items: 1, share: 0.1 },
];

const sets = new Map<number, PictureSet>();
for (const size of [64, 128]) sets.set(size, await loadPictures({ size, cacheFolder: CACHE }));
const pairs = trainingPairs();

function batch(random: TorchGenerator) {
  let choice = random.uniform(1)[0]!;
  const shape = SHAPES.find(({ share }) => (choice -= share) < 0) ?? SHAPES[0]!;
  const { from, side, items } = shape;
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

const initial = torchGenerator(1);
const values = new Map(
  [...vaeTensors(VAE)].map(([name, shape]) => [name, initialValue(name, shape, (count) => initial.normal(count))]),
);
const { loss, pixels, divergence } = autoencoderLoss(VAE, trainableWeights().weights);
const trainer = await createTrainer(nodeRuntime(), {
  loss,
  metrics: { pixels, divergence },
  values,
  averageDecay: 0.998,
  optimizer: { weightDecay: 1e-3, beta2: 0.99 },
});
await runStage({
  trainer,
  stateFile: join(CACHE, 'vae.state.safetensors'),
  steps: STEPS,
  batch,
  learningRate: warmupCosine(2e-3, 100, STEPS),
  onStep: progressLog('vae', STEPS),
});
