/**
 * What a training run is told: models, data sets, stages. One schema validates it, gives its defaults, and is written
 * out as JSON Schema for editors (`schema/train.schema.json`).
 *
 * A run is a list of stages. Each begins with what the one before it made: pretraining from scratch, fine-tuning, LoRA,
 * the autoencoder and the tokenizers are stages of one trainer.
 */

import { z } from 'zod';
import { MmditxError } from '../errors.ts';
import { PRECISIONS } from '../weights/convert.ts';
import { quote } from '../weights/quote.ts';
import { give, problemMessage, problemText } from './config-problems.ts';
import { learningRateSchedules } from './learning-rate.ts';

const count = z.int().min(1);
const share = z.number().min(0).max(1);
const positive = z.number().positive();
const pixels = z.int().min(8).max(16_384);
const size = z.tuple([pixels, pixels]).describe('[width, height] in pixels');
const colour = z.string().regex(/^#[0-9a-fA-F]{6}$/, { error: give('a colour like "#ffffff" (in quotes)') });
const letters = { error: give('letters, digits, dots and dashes only') };

/** Width and height of pictures, in pixels. */
export type PictureSize = readonly [width: number, height: number];

const buckets = z
  .strictObject({
    min: pixels.default(256).describe('Shortest side of a bucket, in pixels.'),
    max: pixels.default(1024).describe('Longest side of a bucket, in pixels.'),
    step: z.int().min(8).default(64).describe('Sides are multiples of this.'),
    upscale: z.boolean().default(true).describe('Whether pictures smaller than their bucket are enlarged.'),
  })
  .describe('Aspect-ratio buckets as in kohya sd-scripts; without them every picture has the exact size.');

const captions = z
  .strictObject({
    extension: z.string().default('.txt').describe('Of the caption file beside each picture.'),
    prefix: z.string().default('').describe('Set before every caption, with a space between.'),
    suffix: z.string().default('').describe('Set behind every caption, with a space between.'),
    shuffle: z.boolean().default(false).describe('Shuffle the tags of a caption each time it is shown.'),
    separator: z.string().default(',').describe('What lies between tags.'),
    keepTokens: z.int().min(0).default(0).describe('Tags at the start that stay where they are.'),
    keepTokensSeparator: z
      .string()
      .default('|||')
      .describe('Ends the tags that stay where they are, where a caption has it.'),
    dropRate: share.default(0).describe('Share of captions shown empty.'),
    tagDropRate: share.default(0).describe('Share of tags left out.'),
    wildcards: z
      .boolean()
      .default(true)
      .describe('Choose one of several lines, and one of {several|words|in|braces}, each time.'),
  })
  .describe('How captions are read and varied, with the meanings of kohya sd-scripts.');

const dataset = z.strictObject({
  path: z.string().describe('Folder of pictures, a .jsonl with file_name and text, or a text file with a path a line.'),
  sizes: z
    .array(
      z.union([pixels.describe('Side of a square'), size], {
        error: give('a side in pixels such as 512, or [width, height]'),
      }),
    )
    .min(1)
    .describe('Sizes in pixels: a number S stands for an area of S x S, over which buckets spread.'),
  assign: z
    .enum(['every', 'spread'])
    .default('every')
    .describe('With several sizes: each picture in every size, or the pictures dealt out over them.'),
  buckets: buckets.optional(),
  fit: z.enum(['cover', 'contain']).default('cover').describe('Crop what is too much, or fill up with the background.'),
  crop: z.enum(['centre', 'random']).default('centre').describe('Which part of a picture is cropped (or padded).'),
  cropVariants: count.default(4).describe('Random crops kept of each picture where latents are cached.'),
  flip: z.boolean().default(false).describe('Show pictures mirrored half of the time.'),
  filter: z
    .enum(['lanczos3', 'lanczos2', 'cubic', 'mitchell', 'linear', 'nearest'])
    .default('lanczos3')
    .describe('How pictures are resized.'),
  backgrounds: z
    .array(z.strictObject({ colour, words: z.record(z.string(), z.string()).default({}) }))
    .min(1)
    .default([{ colour: '#ffffff', words: {} }])
    .describe('Colours behind transparency and padding; words replace {name} in captions.'),
  repeats: count.default(1).describe('How often a picture is shown in an epoch.'),
  captions: captions.prefault({}),
});
export type DatasetConfig = z.infer<typeof dataset>;

const density = z
  .discriminatedUnion('kind', [
    z.strictObject({ kind: z.literal('logit-normal'), mean: z.number().default(0), std: positive.default(1) }),
    z.strictObject({ kind: z.literal('mode'), scale: z.number().default(1.29) }),
    z.strictObject({ kind: z.literal('cosmap') }),
    z.strictObject({ kind: z.literal('uniform') }),
  ])
  .describe('How noise levels are drawn (SD3 paper, section 3.1).');

const noise = z.strictObject({
  density: density.default({ kind: 'logit-normal', mean: 0, std: 1 }),
  weighting: z
    .strictObject({
      kind: z.enum(['none', 'sigma_sqrt', 'cosmap']).default('none'),
      preconditioned: z.boolean().default(false).describe('Times sigma^2, as diffusers and kohya train by default.'),
    })
    .prefault({})
    .describe('Weight of the velocity loss by noise level.'),
  shift: z
    .union([positive, z.literal('resolution')], { error: give('a factor such as 3, or resolution') })
    .default(1)
    .describe('Moves noise levels towards noise: a factor, or sqrt(m / n) of the size (SD3 paper, section 5.3.2).'),
  countedFrom: z
    .enum(['clean', 'noisy'])
    .default('clean')
    .describe('End that densities count from: clean as in the paper and kohya, noisy as in diffusers.'),
  baseResolution: pixels.default(256).describe('Side in pixels at which the resolution-dependent shift is 1.'),
  min: share.default(0).describe('Lowest noise level: all are squeezed between the two after the shift.'),
  max: share.default(1).describe('Highest noise level.'),
});

const learningRate = z.strictObject({
  peak: positive.describe('Highest learning rate.'),
  schedule: z.enum(learningRateSchedules).default('constant').describe('How it falls after the warm-up.'),
  warmup: z.int().min(0).default(0).describe('Steps of linear rise from 0.'),
  end: share.default(0).describe('Share of the peak left at the last step.'),
  cycles: count.default(1).describe('Falls of the cosine.'),
  power: positive.default(1).describe('Exponent of polynomial.'),
});

const optimizer = z.strictObject({
  beta1: share.default(0.9),
  beta2: share.default(0.999),
  eps: positive.default(1e-8),
  weightDecay: z.number().min(0).default(0.01).describe('Share taken off for each unit of learning rate.'),
});

const average = z
  .strictObject({ decay: share.default(0.999), every: count.default(1).describe('Steps between two updates.') })
  .describe('Exponential moving average of the weights; a stage hands the average on to the next.');

/** Layers that a LoRA can change, by their place in the network. */
export const LORA_TARGETS = ['attention', 'mlp', 'modulation', 'embedders', 'output'] as const;

const lora = z.strictObject({
  rank: z.int().min(1).max(1024).default(16),
  alpha: positive.optional().describe('Strength is alpha / rank (default alpha = rank).'),
  dropout: z.number().min(0).lt(1).default(0).describe('Share of the ranks of each layer left out at each step.'),
  targets: z
    .array(z.enum(LORA_TARGETS))
    .min(1)
    .default(['attention', 'mlp'])
    .describe('Kinds of layers that are changed; of text encoders attention and mlp.'),
  streams: z
    .array(z.enum(['image', 'context']))
    .min(1)
    .default(['image', 'context'])
    .describe("The transformer's two halves: that of pictures and that of texts."),
  blocks: z.array(z.int().min(0)).optional().describe('Indices of the blocks (default all).'),
  from: z.string().optional().describe('A LoRA file to go on from.'),
  format: z.enum(['kohya', 'diffusers']).default('kohya').describe('Layout of the file that is written.'),
});
export type LoraConfig = z.infer<typeof lora>;

const trained = z.enum(['full', 'lora', 'frozen']);

const positionGrid = z
  .strictObject({ grid: count, span: positive })
  .describe('The middle grid x grid patches of the position table span the positions 0 to span (SD3: 64 and 16).');

/** What the stages that go through pictures share. */
const common = {
  name: z.string().regex(/^[\w.-]+$/, letters),
  data: z.array(z.string()).min(1).optional().describe('Names of data sets (default all).'),
  steps: count.describe('Optimiser steps.'),
  batch: count.default(1).describe('Pictures of a step, all of one size.'),
  accumulate: count.default(1).describe('Batches whose gradients make one step.'),
  learningRate,
  optimizer: optimizer.prefault({}),
  clip: positive.default(1).describe('Largest norm of the gradients.'),
  average: average.optional(),
};

const diffusion = z.strictObject({
  train: z.literal('diffusion'),
  ...common,
  transformer: trained.default('full').describe('Trained whole, as a LoRA, or not at all.'),
  textEncoders: trained.default('frozen').describe('All three: trained whole, as a LoRA, or not at all.'),
  lora: lora.prefault({}),
  noise: noise.prefault({}),
  text: z
    .strictObject({
      encoderDropout: share
        .optional()
        .describe(
          "Share in which each encoder's output is zero, each by itself (default 0; 0.464, the SD3 paper's, for a transformer from nothing).",
        ),
      t5Tokens: count.optional().describe("Length of T5's text (default the model's, 77); frozen encoders only."),
    })
    .prefault({}),
  positions: z
    .strictObject({
      randomCrop: share.default(0).describe('Share of steps that take a random crop of the position table.'),
      table: count.optional().describe('Side to which a smaller position table is extended, in patches.'),
      grid: positionGrid.optional(),
    })
    .prefault({}),
  posterior: z
    .enum(['sample', 'mean'])
    .default('sample')
    .describe("How latents are taken from the encoder's posterior."),
  attentionLogits: z
    .boolean()
    .optional()
    .describe('Log the largest attention logit, which grows before training diverges (not with checkpointing).'),
  checkpointing: count
    .optional()
    .describe('Blocks a segment: activations inside segments are computed again instead of kept.'),
});

const autoencoder = z.strictObject({
  train: z.literal('autoencoder'),
  ...common,
  only: z.enum(['all', 'decoder']).default('all').describe('A new decoder keeps the latents as they are.'),
  crop: pixels.optional().describe('Side of random crops trained on (default whole pictures).'),
  loss: z
    .strictObject({
      edges: z.number().min(0).default(1),
      colour: z.number().min(0).default(2),
      readouts: z
        .number()
        .min(0)
        .default(0.5)
        .describe('Weight of pictures read linearly off latent and decoder levels.'),
      divergence: z.number().min(0).default(1e-4),
    })
    .prefault({}),
  normalize: z
    .boolean()
    .default(false)
    .describe('At the end, scale the latent channels to the standard deviation 1 / latentScale.'),
});

const tokenizers = z.strictObject({
  train: z.literal('tokenizers'),
  name: common.name,
  data: common.data,
  clipVocabulary: z.int().min(514).default(2600).describe('Most entries of the CLIP vocabulary.'),
  t5Vocabulary: z.int().min(100).default(900).describe('Most entries of the T5 vocabulary.'),
  lowercase: z.boolean().default(true),
});

const stage = z.discriminatedUnion('train', [diffusion, autoencoder, tokenizers]);
export type StageConfig = z.infer<typeof stage>;
export type DiffusionStage = z.infer<typeof diffusion>;
export type AutoencoderStage = z.infer<typeof autoencoder>;
export type TokenizersStage = z.infer<typeof tokenizers>;

const networks = z
  .strictObject({
    transformer: z
      .strictObject({
        hiddenSize: count,
        depth: count,
        heads: count,
        mlpHidden: count,
        tableSize: count,
        dualAttentionLayers: z.array(z.int().min(0)),
        qkNorm: z.boolean(),
        positions: positionGrid,
      })
      .partial(),
    vae: z
      .strictObject({ channels: count, multipliers: z.array(count).min(1), resBlocks: count, groups: count })
      .partial(),
    clipL: z.strictObject({ width: count, layers: count, heads: count, mlpWidth: count, positions: count }).partial(),
    clipG: z.strictObject({ width: count, layers: count, heads: count, mlpWidth: count, positions: count }).partial(),
    t5: z.strictObject({ layers: count, heads: count, headDim: count, mlpWidth: count, tokens: count }).partial(),
  })
  .partial()
  .describe('Networks to be trained from scratch: what differs from Stable Diffusion 3.5 Medium.');
export type NetworksConfig = z.infer<typeof networks>;

const samples = z.strictObject({
  every: count.default(500).describe('Steps between two rounds; there is one at the end of each stage, too.'),
  prompts: z
    .array(
      z.strictObject({
        prompt: z.string(),
        negative: z.string().default(''),
        size: size.optional(),
        seed: z.int().min(0).default(0),
      }),
    )
    .min(1),
  steps: count.default(28),
  cfg: z.number().default(4.5),
});

const validation = z.strictObject({
  every: count.default(500),
  share: z.number().gt(0).lt(1).default(0.05).describe('Pictures kept out of training for it.'),
  path: z.string().optional().describe('A data set of its own instead.'),
  pictures: count.default(64).describe('At most as many.'),
});

const checkpoints = z.strictObject({
  every: count.default(250).describe('Steps between two saved states.'),
  keep: count.default(2).describe('Newest states that are kept.'),
  keepEvery: count.optional().describe('States of every so many steps that stay for good.'),
});

const exported = z.strictObject({
  file: z.string(),
  precision: z.enum(['fp32', 'fp16']).default('fp16'),
  defaults: z
    .record(z.string(), z.unknown())
    .default({})
    .describe("The model's own defaults: width, height, steps, cfg."),
});

export const trainConfigSchema = z.strictObject({
  $schema: z.string().optional(),
  name: z.string().regex(/^[\w.-]+$/, letters),
  output: z.string().optional().describe('Folder of the run (default runs/NAME beside the configuration).'),
  model: z
    .union([z.string(), z.array(z.string()).min(1)], {
      error: give('the path of a file or folder, or a list of files'),
    })
    .optional()
    .describe('Files of the model to go on from.'),
  networks: networks.optional(),
  precision: z
    .enum(PRECISIONS)
    .optional()
    .describe('What frozen weights are kept as (default as stored; int8 is faster on a processor).'),
  seed: z.int().min(0).default(0).describe('Decides all draws: the same seed repeats a run.'),
  device: z.enum(['cpu', 'webgpu', 'cuda', 'dml', 'coreml']).optional().describe('Default: the fastest that works.'),
  threads: count.optional().describe('Of the processor (default: as many as it has, at most 16).'),
  clipTokenizer: z.string().optional().describe('tokenizer.json, where the model brings none.'),
  t5Tokenizer: z.string().optional(),
  data: z.record(z.string(), dataset).describe('Data sets by names of your own; stages refer to them.'),
  cache: z
    .union([z.string(), z.literal(false)], { error: give('the path of a folder, or false') })
    .optional()
    .describe('Folder of encoded pictures and texts (default cache in the run folder); false encodes on the fly.'),
  stages: z.array(stage).min(1).describe('Done one after the other; each goes on from what the one before made.'),
  checkpoints: checkpoints.prefault({}),
  samples: samples.optional(),
  validation: validation.optional(),
  export: exported
    .optional()
    .describe("The finished model, all parts in one file (without it: the last stage's file)."),
});
export type TrainConfig = z.infer<typeof trainConfigSchema>;

/** Problems told in one message. */
const TOLD_PROBLEMS = 5;

/**
 * Validates a parsed configuration and fills in its defaults.
 * @throws MmditxError `bad-option` with the places of all problems
 */
export function checkTrainConfig(value: unknown, file: string): TrainConfig {
  const parsed = trainConfigSchema.safeParse(value, { error: problemMessage });
  const problems = parsed.success ? contradictions(parsed.data) : parsed.error.issues.map(problemText);
  if (problems.length > 0) {
    const told = problems.slice(0, TOLD_PROBLEMS).join('; ');
    const more = problems.length > TOLD_PROBLEMS ? `; and ${problems.length - TOLD_PROBLEMS} more` : '';
    throw new MmditxError('bad-option', `${file} is not a training configuration: ${told}${more}.`);
  }
  return parsed.data!;
}

/** What no single field tells. */
function contradictions(config: TrainConfig): string[] {
  const { data, stages, model, networks: fresh, validation: held, export: finished } = config;
  const problems: string[] = [];
  if (Object.keys(data).length === 0) problems.push('data is empty, name at least one data set');
  if (model === undefined && fresh === undefined) {
    problems.push('model is missing, give the files to go on from, or "networks" to train from scratch');
  }
  let earlier: DiffusionStage | undefined;
  const names = stages.map(({ name }) => name);
  for (const [i, entry] of stages.entries()) {
    if (names.indexOf(entry.name) !== i) {
      problems.push(`stages[${i}].name is ${quote(entry.name)} as that of another stage, give each its own`);
    }
    for (const name of entry.data ?? []) {
      if (!(name in data)) {
        problems.push(
          `stages[${i}].data names ${quote(name)}, give some of ${Object.keys(data).map(quote).join(', ')}`,
        );
      }
    }
    if (entry.train === 'tokenizers') continue;
    if (entry.average && entry.average.every > entry.steps) {
      problems.push(`stages[${i}].average.every is ${entry.average.every}, give at most its steps, ${entry.steps}`);
    }
    if (entry.train === 'autoencoder') {
      if (entry.normalize && entry.only === 'decoder') {
        problems.push(
          `stages[${i}] has normalize with only: decoder, give one of them: the one changes latents, the other keeps them`,
        );
      }
      continue;
    }
    if (entry.transformer === 'frozen' && entry.textEncoders === 'frozen') {
      problems.push(`stages[${i}] has both transformer and textEncoders frozen, give one of them full or lora`);
    }
    if (entry.noise.min >= entry.noise.max) {
      problems.push(`stages[${i}].noise.min is ${entry.noise.min}, give less than max, ${entry.noise.max}`);
    }
    const { kind, preconditioned } = entry.noise.weighting;
    if (kind === 'sigma_sqrt' && !preconditioned && entry.noise.min === 0) {
      problems.push(
        `stages[${i}].noise.weighting is infinite without noise, give noise.min above 0 or preconditioned: true`,
      );
    }
    if (entry.positions.table !== undefined && entry.transformer !== 'full') {
      problems.push(`stages[${i}].positions.table needs the transformer trained, give transformer: full`);
    }
    if (entry.attentionLogits && entry.checkpointing !== undefined) {
      problems.push(`stages[${i}] has attentionLogits and checkpointing, give one of them`);
    }
    if (entry.lora.from !== undefined && loraOf(earlier)) {
      problems.push(`stages[${i}].lora.from would discard what the stage before learned, leave it out`);
    }
    if (loraOf(earlier) && formOf(earlier!) !== formOf(entry)) {
      problems.push(
        `stages[${i}] follows a LoRA, give it the same lora settings, or a run of its own on the merged model`,
      );
    }
    earlier = entry;
  }
  if (finished && loraOf(earlier)) {
    problems.push('export cannot hold a LoRA, leave it out and use mmditx lora merge');
  }
  if (held?.path !== undefined && held.path === '')
    problems.push('validation.path is empty, give a data set or leave it out');
  return problems;
}

function loraOf(stage: DiffusionStage | undefined): boolean {
  return stage?.transformer === 'lora' || stage?.textEncoders === 'lora';
}

/** What two stages must share for one LoRA to go on in the other. */
function formOf({ transformer, textEncoders, lora: { rank, targets, streams, blocks } }: DiffusionStage): string {
  return JSON.stringify([transformer, textEncoders, rank, targets, streams, blocks]);
}

/** The schema for editors, of draft 7, which all of them know. */
export function trainConfigJsonSchema(): z.core.JSONSchema.JSONSchema {
  const schema = z.toJSONSchema(trainConfigSchema, {
    io: 'input',
    target: 'draft-7',
    override({ jsonSchema }) {
      // Bounds of exact whole numbers say nothing to people.
      if (jsonSchema.maximum === Number.MAX_SAFE_INTEGER) delete jsonSchema.maximum;
    },
  });
  const anchors = { '^\\.': { description: 'Only holds settings that others refer to (&name, *name, <<).' } };
  return { title: 'mmditx training configuration', ...schema, patternProperties: anchors };
}
