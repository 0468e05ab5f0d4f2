import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { parse } from 'yaml';
import { z } from 'zod';
import { MmditxError } from '../../src/errors.ts';
import { SD35_MEDIUM_TRANSFORMER } from '../../src/models/config.ts';
import { checkTrainConfig, type DiffusionStage, trainConfigJsonSchema } from '../../src/training/config.ts';
import { readTrainConfig } from '../../src/training/config-file.node.ts';

const root = join(import.meta.dirname, '../..');

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-config-'));
});
afterAll(() => rm(folder, { recursive: true }));

async function written(text: string, name = 'run.yaml'): Promise<string> {
  const path = join(folder, name);
  await writeFile(path, text);
  return path;
}

const read = async (text: string) => (await readTrainConfig(await written(text))).config;

/** The message of the error that reading a text ends with. */
async function refusal(text: string): Promise<string> {
  const error: unknown = await read(text).then(
    () => undefined,
    (thrown) => thrown,
  );
  expect(error).toBeInstanceOf(MmditxError);
  expect(error).toHaveProperty('code', 'bad-option');
  return (error as MmditxError).message;
}

const SHORTEST = `
name: short
model: model.safetensors
data:
  own: { path: pictures, sizes: [512] }
stages:
  - { name: first, train: diffusion, steps: 10, learningRate: { peak: 1e-4 } }
`;

const firstStage = ({ stages }: { stages: readonly { train: string }[] }) => stages[0] as DiffusionStage;

describe('defaults', () => {
  it('of a diffusion stage: all of the transformer, text encoders as they are, plain AdamW', async () => {
    expect(firstStage(await read(SHORTEST))).toEqual({
      train: 'diffusion',
      name: 'first',
      steps: 10,
      batch: 1,
      accumulate: 1,
      learningRate: { peak: 1e-4, schedule: 'constant', warmup: 0, end: 0, cycles: 1, power: 1 },
      // torch.optim.AdamW's own.
      optimizer: { beta1: 0.9, beta2: 0.999, eps: 1e-8, weightDecay: 0.01 },
      clip: 1,
      transformer: 'full',
      textEncoders: 'frozen',
      lora: {
        rank: 16,
        dropout: 0,
        targets: ['attention', 'mlp'],
        streams: ['image', 'context'],
        format: 'kohya',
      },
      noise: {
        // The SD3 paper's best density, with every level weighted alike.
        density: { kind: 'logit-normal', mean: 0, std: 1 },
        weighting: { kind: 'none', preconditioned: false },
        shift: 1,
        countedFrom: 'clean',
        baseResolution: 256,
        min: 0,
        max: 1,
      },
      text: {},
      positions: { randomCrop: 0 },
      posterior: 'sample',
    });
  });

  it('of a data set: centre crops, captions in .txt files, nothing varied', async () => {
    const { data } = await read(SHORTEST);
    expect(data.own).toMatchObject({ fit: 'cover', crop: 'centre', flip: false, repeats: 1, assign: 'every' });
    expect(data.own).not.toHaveProperty('buckets');
    expect(data.own!.captions).toEqual({
      extension: '.txt',
      prefix: '',
      suffix: '',
      shuffle: false,
      separator: ',',
      keepTokens: 0,
      keepTokensSeparator: '|||',
      dropRate: 0,
      tagDropRate: 0,
      wildcards: true,
    });
  });

  it("of buckets: kohya's", async () => {
    const { data } = await read(SHORTEST.replace('sizes: [512]', 'sizes: [512], buckets: {}'));
    expect(data.own!.buckets).toEqual({ min: 256, max: 1024, step: 64, upscale: true });
  });

  it('of a run: saved every 250 steps, neither samples nor validation nor export', async () => {
    const { seed, checkpoints, samples, validation, export: exported } = await read(SHORTEST);
    expect({ seed, checkpoints, samples, validation, exported }).toEqual({
      seed: 0,
      checkpoints: { every: 250, keep: 2 },
      samples: undefined,
      validation: undefined,
      exported: undefined,
    });
  });
});

describe('a mistake is told with its place, what stands there, and what to give:', () => {
  const inStage = (extra: string) => SHORTEST.replace('steps: 10,', `steps: 10, ${extra},`);
  const inData = (extra: string) => SHORTEST.replace('sizes: [512]', `sizes: [512], ${extra}`);

  it.each([
    ['a misspelt setting', inStage('learning_rate: 1'), 'stages[0] has "learning_rate" (did you mean learningRate?)'],
    ['a letter too many', inStage('batchs: 4'), 'stages[0] has "batchs" (did you mean batch?)'],
    ['two letters swapped', inData('filp: true'), 'data.own has "filp" (did you mean flip?)'],
    ['a setting of other trainers', inData('buckets: { no_upscale: true }'), 'give some of min, max, step, upscale'],
    ['a missing setting', SHORTEST.replace('steps: 10, ', ''), 'stages[0].steps is missing, give a number'],
    [
      'a bare learning rate',
      SHORTEST.replace('{ peak: 1e-4 }', '1e-4'),
      'stages[0].learningRate is 0.0001, give settings, such as { peak: 0.0001 }',
    ],
    ['a bare size', SHORTEST.replace('[512]', '512'), 'data.own.sizes is 512, give a list, such as [512]'],
    [
      'a size as text',
      SHORTEST.replace('[512]', '[512x512]'),
      'data.own.sizes[0] is "512x512", give a side in pixels such as 512, or [width, height]',
    ],
    ['a tiny size', SHORTEST.replace('[512]', '[4]'), 'data.own.sizes[0] is 4, give at least 8'],
    ['no steps', SHORTEST.replace('steps: 10', 'steps: 0'), 'stages[0].steps is 0, give at least 1'],
    ['half a step', SHORTEST.replace('steps: 10', 'steps: 1.5'), 'stages[0].steps is 1.5, give a whole number'],
    ['a share above 1', inStage('text: { encoderDropout: 46.4 }'), 'encoderDropout is 46.4, give at most 1'],
    ['a word for a switch', inData('flip: often'), 'data.own.flip is "often", give true or false'],
    [
      'a name of other trainers',
      inStage('lora: { targets: [attn] }'),
      'stages[0].lora.targets[0] is "attn", give one of attention, mlp, modulation, embedders, output',
    ],
    [
      'a kind of stage',
      SHORTEST.replace('train: diffusion', 'train: lora'),
      'stages[0].train is "lora", give one of diffusion, autoencoder, tokenizers',
    ],
    [
      'a density by its name',
      inStage('noise: { density: uniform }'),
      'stages[0].noise.density is "uniform", give settings, such as { kind: "uniform" }',
    ],
    ['a shift', inStage('noise: { shift: auto }'), 'shift is "auto", give a factor such as 3, or resolution'],
    [
      'a colour by its name',
      inData('backgrounds: [{ colour: white }]'),
      'data.own.backgrounds[0].colour is "white", give a colour like "#ffffff" (in quotes)',
    ],
    ['a name with a slash', SHORTEST.replace('short', 'a/b'), 'name is "a/b", give letters, digits, dots and dashes'],
    ['an empty setting', SHORTEST.replace('model: model.safetensors', 'model:'), 'model is empty, give the path'],
    ['no model', SHORTEST.replace('model: model.safetensors', ''), 'model is missing, give the files to go on from'],
    ['a data set that is not there', inStage('data: [mine]'), 'stages[0].data names "mine", give some of "own"'],
    ['nothing to train', inStage('transformer: frozen'), 'stages[0] has both transformer and textEncoders frozen'],
    ['noise levels the wrong way round', inStage('noise: { min: 0.8, max: 0.2 }'), 'noise.min is 0.8, give less than'],
  ])('%s', async (_, text, expected) => {
    const message = await refusal(text);
    expect(message).toMatch(/^run\.yaml is not a training configuration: /);
    expect(message).toContain(expected);
    expect(message).toMatch(/[^.]\.$/);
  });

  it('stages of one name', async () => {
    const [, stage] = SHORTEST.split('stages:\n');
    expect(await refusal(SHORTEST + stage)).toContain('stages[1].name is "first" as that of another stage');
  });

  it('several at once, the first five of many', async () => {
    const wrong = (count: number) =>
      SHORTEST.replace('steps: 10', Array.from({ length: count }, (_, i) => `wrong${i}: 1`).join(', '));
    const two = await refusal(SHORTEST.replace('name: short', 'name: a b').replace('steps: 10', 'steps: 0'));
    expect(two).toContain('name is "a b"');
    expect(two).toContain('; stages[0].steps is 0');
    expect(await refusal(wrong(9))).toContain('"wrong2", 6 more, which is no setting there');
    const seven = SHORTEST.replace('[512]', '[1, 2, 3, 4, 5, 6, 7]');
    expect(await refusal(seven)).toMatch(/sizes\[4\] is 5, give at least 8; and 2 more\.$/);
  });

  it('names with control characters, which do not reach the terminal', async () => {
    const message = await refusal(SHORTEST.replace('own:', '"own\\n\\e[31m":').replace('[512]', '[1]'));
    expect(message).toContain('data["own\\n\\u001b[31m"].sizes[0] is 1');
    const unknown = await refusal(`${SHORTEST}"\\e[31m": 1\n`);
    expect(unknown).not.toContain('\u001b');
  });
});

describe('the file', () => {
  it('may be JSON, with $schema', async () => {
    const value: object = parse(SHORTEST);
    expect(await read(JSON.stringify({ $schema: 'train.schema.json', ...value }))).toMatchObject({ name: 'short' });
  });

  it('shares settings by anchors and merge keys, where what stands in the stage wins', async () => {
    const { stages } = await read(`
name: shared
model: m
data: { own: { path: p, sizes: [64] } }
.stage: &stage { train: diffusion, steps: 10, batch: 4, learningRate: { peak: 1e-4 } }
.noise: &noise { noise: { shift: 3 }, batch: 8 }
stages:
  - { <<: *stage, name: one }
  - { <<: *stage, name: two, batch: 2 }
  - { <<: [*stage, *noise], name: three }
`);
    expect(stages).toMatchObject([
      { name: 'one', batch: 4, noise: { shift: 1 } },
      { name: 'two', batch: 2 },
      { name: 'three', batch: 4, noise: { shift: 3 } },
    ]);
  });

  it('gives paths from its own folder, and the folder of the run beside it', async () => {
    const { resolve, output } = await readTrainConfig(await written(SHORTEST));
    expect(resolve('pictures')).toBe(join(folder, 'pictures'));
    expect(resolve('/elsewhere/pictures')).toBe('/elsewhere/pictures');
    expect(output).toBe(join(folder, 'runs', 'short'));
    const other = await readTrainConfig(await written(`${SHORTEST}output: ../there\n`));
    expect(other.output).toBe(join(folder, '..', 'there'));
  });

  it.each([
    ['wrong indentation', 'name: a\n  model: b\n'],
    ['an open bracket', 'name: [a\n'],
    ['one key twice', 'name: a\nname: b\n'],
  ])('with %s is refused with the line', async (_, text) => {
    expect(await refusal(text)).toMatch(/^run\.yaml cannot be read: .* line \d+, column \d+\.$/);
  });

  it('with an anchor that is not there is refused', async () => {
    expect(await refusal(`${SHORTEST}cache: *nowhere\n`)).toMatch(/^run\.yaml cannot be read: .*nowhere/);
  });

  it('whose aliases multiply without bound is refused', async () => {
    const levels = Array.from({ length: 12 }, (_, i) =>
      i === 0
        ? '.l0: &l0 [x, x, x, x, x, x, x, x, x]'
        : `.l${i}: &l${i} [${Array(9)
            .fill(`*l${i - 1}`)
            .join(', ')}]`,
    );
    expect(await refusal(`${levels.join('\n')}\n${SHORTEST}`)).toMatch(/^run\.yaml cannot be read: .*alias/);
  });

  it('that is empty, a text, or a list is refused', async () => {
    expect(await refusal('')).toContain('it is empty, give settings, such as { name: ... }');
    expect(await refusal('hello')).toContain('it is "hello", give settings');
    expect(await refusal('- a')).toContain('it is a list, give settings');
  });

  it('that is too large for one written by hand is refused', async () => {
    expect(await refusal(`${SHORTEST}#${'x'.repeat(2 ** 20)}`)).toMatch(/too large for a training configuration/);
  });

  it('that is not there is told', async () => {
    await expect(readTrainConfig(join(folder, 'none.yaml'))).rejects.toMatchObject({
      code: 'io',
      message: expect.stringContaining('none.yaml'),
    });
  });
});

const schemaPath = join(root, 'schema/train.schema.json');
const configs = [...(await readdir(join(root, 'configs'))).map((name) => `configs/${name}`), 'models/small/train.yaml'];

describe('the schema for editors', () => {
  it('is up to date (npm run schema writes it)', async () => {
    expect(JSON.parse(await readFile(schemaPath, 'utf8'))).toEqual(JSON.parse(JSON.stringify(trainConfigJsonSchema())));
  });

  const schema = z.fromJSONSchema(trainConfigJsonSchema());
  const accepts = (text: string) => schema.safeParse(parse(text, { merge: true })).success;

  it('accepts what the reader accepts, keys that begin with a dot, too', () => {
    expect(accepts(SHORTEST)).toBe(true);
    expect(accepts(`$schema: x\n.anything: { a: 1 }\n${SHORTEST}`)).toBe(true);
  });

  it.each([
    ['unknown keys', `${SHORTEST}anything: 1\n`],
    ['unknown keys of stages', SHORTEST.replace('steps: 10', 'steps: 10, anything: 1')],
    ['wrong types', SHORTEST.replace('steps: 10', 'steps: many')],
    ['missing settings', SHORTEST.replace('steps: 10, ', '')],
    ['numbers out of range', SHORTEST.replace('[512]', '[4]')],
  ])('refuses %s', (_, text) => {
    expect(accepts(text)).toBe(false);
  });

  it.each(configs)('fits %s, which names it for the editor', async (name) => {
    const text = await readFile(join(root, name), 'utf8');
    expect(accepts(text)).toBe(true);
    const [, path] = /^# yaml-language-server: \$schema=(\S+)\n/.exec(text) ?? [];
    expect(join(root, name, '..', path!)).toBe(schemaPath);
  });
});

describe('the configurations that ship', () => {
  it.each(configs)('%s is valid', async (name) => {
    await expect(readTrainConfig(join(root, name))).resolves.toBeDefined();
  });

  it('pretrain the released network with the published figures', async () => {
    const { config } = await readTrainConfig(join(root, 'configs/sd3.5-medium-pretrain.yaml'));
    const { positions, ...transformer } = config.networks!.transformer!;
    expect(SD35_MEDIUM_TRANSFORMER).toMatchObject(transformer);
    expect(positions).toEqual({ grid: 64, span: 16 });
    const stages = config.stages as DiffusionStage[];
    // Model card of Stable Diffusion 3.5 Medium.
    const largest = stages.map(({ data }) => Math.max(...data!.map((name) => Number(config.data[name]!.sizes[0]))));
    expect(largest).toEqual([256, 512, 768, 1024, 1440]);
    expect(stages.at(-1)!.data!.length).toBeGreaterThan(1);
    for (const { batch, accumulate, text, optimizer, average, learningRate, noise, positions: at } of stages) {
      // SD3 paper: batch, learning rate, warm-up, average of the ablations; dropout of section B.3; eps of section 5.3.2.
      expect(batch * accumulate).toBe(1024);
      expect(text.encoderDropout).toBe(0.464);
      expect(optimizer.eps).toBe(1e-15);
      expect(average).toEqual({ decay: 0.99, every: 100 });
      expect(learningRate).toMatchObject({ peak: 1e-4, warmup: 1000 });
      expect(noise.density).toEqual({ kind: 'logit-normal', mean: 0, std: 1 });
      expect(at.randomCrop).toBeGreaterThan(0);
    }
    // A shift of 3 at 1024 pixels.
    const { shift, baseResolution } = stages.find(({ name }) => name === 'size-1024')!.noise;
    expect(shift).toBe('resolution');
    expect(1024 / baseResolution).toBeCloseTo(3, 2);
  });
});

describe('the guide', () => {
  it('shows configurations that are valid', async () => {
    const text = await readFile(join(root, 'docs/training.md'), 'utf8');
    const blocks = [...text.matchAll(/```yaml\n(.*?)```/gs)].map(([, block]) => block!);
    const whole = blocks.filter((block) => block.startsWith('name:'));
    expect(whole.length).toBeGreaterThan(0);
    for (const block of whole) expect(() => checkTrainConfig(parse(block, { merge: true }), 'guide')).not.toThrow();
  });
});
