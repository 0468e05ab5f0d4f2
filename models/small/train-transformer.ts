/** Third stage of the recipe: the transformer and the three text encoders together, first small, then at full size. */

import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { clip } from '../../src/models/clip.ts';
import { joinEncoders } from '../../src/models/conditioning.ts';
import { centreCorner } from '../../src/models/mmditx.ts';
import { t5Encoder } from '../../src/models/t5.ts';
import { within } from '../../src/models/weights.ts';
import { nodeRuntime } from '../../src/runtime/node.node.ts';
import { type TorchGenerator, torchGenerator } from '../../src/sampling/noise.ts';
import * as t from '../../src/tensor/index.ts';
import { initialValue, positionTable } from '../../src/training/initial.ts';
import { timestepInput, velocityLoss } from '../../src/training/loss.ts';
import { runStage, warmupCosine } from '../../src/training/stage.node.ts';
import { createTrainer, type Parameters, trainableWeights } from '../../src/training/trainer.ts';
import { clipTensors, t5Tensors, transformerTensors } from '../../src/weights/expected.ts';
import { prepareTexts } from './captions-to-ids.ts';
import { TRANSFORMER } from './configs.ts';
import { BACKGROUNDS, caption } from './data/captions.ts';
import { trainingPairs } from './data/held-out.ts';
import { OBJECTS } from './data/objects.ts';
import { STYLES } from './data/pictures.ts';
import { latentsOf, readAll } from './latents.ts';
import { progressLog } from './log.ts';
import { CACHE } from './paths.ts';

/** Names in the finished file. */
export const PREFIXES = {
  transformer: 'model.diffusion_model',
  clipL: 'text_encoders.clip_l.transformer',
  clipG: 'text_encoders.clip_g.transformer',
  t5: 'text_encoders.t5xxl.transformer',
} as const;

export interface Stage {
  readonly name: string;
  /** Side of the pictures in pixels. */
  readonly size: number;
  readonly batch: number;
  readonly steps: number;
  readonly learningRate: number;
}

export const STAGES: readonly Stage[] = [
  { name: 'transformer-64', size: 64, batch: 64, steps: Number(process.env.STEPS_64 ?? 2200), learningRate: 1e-3 },
  { name: 'transformer-128', size: 128, batch: 32, steps: Number(process.env.STEPS_128 ?? 3400), learningRate: 7e-4 },
];

/** Part of the pictures shown without their caption, for guidance (SD3 paper, section 4: drops text). */
const EMPTY_CAPTIONS = 0.1;
/** Part of the pictures for which one encoder, each by itself, is zero, so that encoders can be left out. */
const DROPPED_ENCODER = 0.1;
/** The grid of patches at 128 px spans this much of the positions, one unit a patch. */
export const GRID = { grid: 8, span: 8 };

export function stateFile(stage: Stage): string {
  return join(CACHE, `${stage.name}.state.safetensors`);
}

const texts = prepareTexts();
const pairs = trainingPairs();

function loss(weights: ReturnType<typeof trainableWeights>['weights']): t.Tensor {
  const batch = t.symbol('batch');
  const ids = (name: string, length: number) => t.input(`${name}.ids`, 'int32', [batch, length]);
  const end = (name: string) => t.input(`${name}.end`, 'int64', [batch]);
  const keep = (name: string) => t.input(`${name}.keep`, 'float32', [batch, 1]);
  const clipOf = (name: 'clipL' | 'clipG') => {
    const config = texts[name];
    const inputs = { ids: ids(name, config.positions), end: end(name) };
    const { hidden, pooled } = clip(config, within(weights, PREFIXES[name]), inputs);
    const kept = keep(name);
    return { hidden: t.multiply(hidden, t.reshape(kept, [batch, 1, 1])), pooled: t.multiply(pooled, kept) };
  };
  const { tokens } = texts.t5;
  const buckets = t.input('t5.buckets', 'int32', [tokens, tokens]);
  const t5Hidden = t5Encoder(texts.t5, within(weights, PREFIXES.t5), { ids: ids('t5', tokens), buckets });
  const t5Kept = t.multiply(t5Hidden, t.reshape(keep('t5'), [batch, 1, 1]));
  const conditioning = joinEncoders(clipOf('clipL'), clipOf('clipG'), t5Kept);
  return velocityLoss(TRANSFORMER, within(weights, PREFIXES.transformer), conditioning);
}

async function initialParameters(previous: Stage | undefined): Promise<Parameters> {
  const random = torchGenerator(2);
  const values: Parameters = new Map();
  const lists = {
    transformer: transformerTensors(TRANSFORMER),
    clipL: clipTensors(texts.clipL),
    clipG: clipTensors(texts.clipG),
    t5: t5Tensors(texts.t5),
  };
  for (const [part, tensors] of Object.entries(lists)) {
    for (const [name, shape] of tensors) {
      const key = `${PREFIXES[part as keyof typeof PREFIXES]}.${name}`;
      values.set(
        key,
        initialValue(name, shape, (count) => random.normal(count)),
      );
    }
  }
  values.set(`${PREFIXES.transformer}.pos_embed`, positionTable(TRANSFORMER, GRID));
  if (previous) {
    for (const [key, tensor] of await readAll(stateFile(previous))) {
      if (key.startsWith('parameter.'))
        values.get(key.slice('parameter.'.length))!.data.set(tensor.data as Float32Array);
    }
  }
  return values;
}

function batchOf(stage: Stage, latents: t.FloatTensor, random: TorchGenerator) {
  const { batch, size } = stage;
  const side = size / 8;
  const shape = [batch, TRANSFORMER.inChannels, side, side];
  const itemSize = t.elementCount(shape.slice(1));
  const latent = new Float32Array(batch * itemSize);
  const captions: string[] = [];
  const chosen = random.integers(0, pairs.length * BACKGROUNDS.length, batch);
  for (const [item, index] of chosen.entries()) {
    latent.set(latents.data.subarray(index * itemSize, (index + 1) * itemSize), item * itemSize);
    const { objectIndex, styleIndex } = pairs[Math.floor(index / BACKGROUNDS.length)]!;
    const text = caption(
      OBJECTS[objectIndex]!,
      STYLES[styleIndex]!,
      BACKGROUNDS[index % BACKGROUNDS.length]!,
      () => random.uniform(1)[0]!,
    );
    captions.push(random.uniform(1)[0]! < EMPTY_CAPTIONS ? '' : text);
  }
  const keep = () =>
    t.floats(
      [batch, 1],
      random.uniform(batch).map((draw) => (draw < DROPPED_ENCODER ? 0 : 1)),
    );
  // Logit-normal with mean 0 and deviation 1 (SD3 paper, section 3.1).
  const sigma = random.normal(batch).map((value) => 1 / (1 + Math.exp(-value)));
  return {
    latent: t.floats(shape, latent),
    noise: t.floats(shape, random.normal(batch * itemSize)),
    sigma: t.floats([batch], sigma),
    timestep: timestepInput(sigma, TRANSFORMER),
    corner: centreCorner(TRANSFORMER.tableSize, side / 2, side / 2),
    'clipL.keep': keep(),
    'clipG.keep': keep(),
    't5.keep': keep(),
    ...texts.inputs(captions),
  };
}

export async function trainTransformer(): Promise<void> {
  let previous: Stage | undefined;
  for (const stage of STAGES) {
    const latents = await latentsOf(stage.size);
    const trainer = await createTrainer(nodeRuntime(), {
      loss: loss(trainableWeights().weights),
      values: await initialParameters(existsSync(stateFile(stage)) ? undefined : previous),
      frozen: (name) => name.endsWith('.pos_embed'),
      averageDecay: 0.98,
      averageEvery: 10,
      optimizer: { weightDecay: 0.01, beta2: 0.99 },
    });
    await runStage({
      trainer,
      stateFile: stateFile(stage),
      steps: stage.steps,
      batch: (random) => batchOf(stage, latents, random),
      learningRate: warmupCosine(stage.learningRate, 200, stage.steps),
      saveEvery: 250,
      onStep: progressLog(stage.name, stage.steps),
    });
    await trainer.dispose();
    previous = stage;
  }
}
