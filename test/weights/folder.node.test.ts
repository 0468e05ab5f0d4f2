import { mkdir, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join, relative } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { MmditxError } from '../../src/errors.ts';
import { modelFiles } from '../../src/weights/folder.node.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-'));
});
afterEach(() => rm(folder, { recursive: true }));

/** Files by their names in the folder, empty where only the name matters. */
async function save(...files: (string | readonly [string, string])[]): Promise<void> {
  for (const file of files) {
    const [name, content] = typeof file === 'string' ? [file, ''] : file;
    await mkdir(dirname(join(folder, name)), { recursive: true });
    await writeFile(join(folder, name), content);
  }
}

/** The names that are chosen, and the notes about it. */
async function choose(): Promise<{ files: string[]; notes: string[] }> {
  const notes: string[] = [];
  const files = await modelFiles(folder, { onNote: (text) => notes.push(text) });
  return { files: files.map((path) => relative(folder, path).replaceAll('\\', '/')), notes };
}

async function refusal(path = folder): Promise<MmditxError> {
  const error = await modelFiles(path).then(
    () => undefined,
    (caught) => caught,
  );
  expect(error).toBeInstanceOf(MmditxError);
  expect(error.message).toMatch(/^[^\n]+\.$/);
  return error;
}

const index = (...shards: string[]) =>
  JSON.stringify({
    metadata: { total_size: 1 },
    weight_map: Object.fromEntries(shards.map((name, i) => [`t${i}`, name])),
  });

const DIFFUSERS = [
  'transformer/diffusion_pytorch_model.safetensors',
  'vae/diffusion_pytorch_model.safetensors',
  'text_encoder/model.safetensors',
  'text_encoder_2/model.safetensors',
];
const SPLIT = ['sd3.5_medium.safetensors', 'text_encoders/clip_g.safetensors', 'text_encoders/clip_l.safetensors'];
const T5_SHARDS = ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'];

test('a file gives itself, whatever it is called', async () => {
  await save('model.bin');
  expect(await modelFiles(join(folder, 'model.bin'))).toEqual([join(folder, 'model.bin')]);
});

test('a path that does not exist is named', async () => {
  expect(await refusal(join(folder, 'none'))).toMatchObject({ code: 'io', message: /none: there is no such file/ });
});

describe('the layout of diffusers', () => {
  test('gives the files of each network, shards by their index', async () => {
    await save(...DIFFUSERS, ['model_index.json', '{}']);
    await save(...T5_SHARDS.map((name) => `text_encoder_3/${name}`), 'text_encoder_3/config.json');
    await save(['text_encoder_3/model.safetensors.index.json', index(...T5_SHARDS.toReversed())]);
    await save('tokenizer/vocab.json', 'scheduler/scheduler_config.json');
    const { files, notes } = await choose();
    expect(files).toEqual([...DIFFUSERS, ...T5_SHARDS.map((name) => `text_encoder_3/${name}`)]);
    expect(notes).toEqual([]);
  });

  test('needs no model_index.json', async () => {
    await save(...DIFFUSERS);
    expect((await choose()).files).toEqual(DIFFUSERS);
  });

  test('is preferred in a repository that has its model in both', async () => {
    await save(...DIFFUSERS, ...SPLIT, 'model_index.json');
    expect((await choose()).files).toEqual(DIFFUSERS);
  });

  test('is not preferred without its model_index.json', async () => {
    await save('transformer/diffusion_pytorch_model.safetensors', ...SPLIT);
    expect((await choose()).files).toEqual(SPLIT);
  });

  test('is not taken where its transformer was not downloaded', async () => {
    await save(...SPLIT, 'model_index.json', 'transformer/config.json', 'text_encoder_3/model.safetensors');
    expect((await choose()).files).toEqual(SPLIT);
  });

  test('takes the plain copy of a network and tells of the others', async () => {
    await save(...DIFFUSERS, 'vae/diffusion_pytorch_model.fp16.safetensors', 'text_encoder/model.fp16.safetensors');
    const { files, notes } = await choose();
    expect(files).toEqual(DIFFUSERS);
    expect(notes).toHaveLength(2);
    expect(notes[0]).toBe(
      `${join(folder, 'vae')} holds "diffusion_pytorch_model" several times; "diffusion_pytorch_model.safetensors" is used (give the files themselves to choose another).`,
    );
  });

  test('takes a variant where there is no plain copy', async () => {
    await save('transformer/diffusion_pytorch_model.fp16.safetensors');
    const shards = T5_SHARDS.map((name) => name.replace('model', 'model.fp16'));
    await save(['text_encoder_3/model.safetensors.index.fp16.json', index(...shards)]);
    await save(...shards.map((name) => `text_encoder_3/${name}`));
    expect(await choose()).toEqual({
      files: [
        'transformer/diffusion_pytorch_model.fp16.safetensors',
        ...shards.map((name) => `text_encoder_3/${name}`),
      ],
      notes: [],
    });
  });

  test('takes plain shards before a variant in one file', async () => {
    await save('text_encoder_3/model.fp16.safetensors', ...T5_SHARDS.map((name) => `text_encoder_3/${name}`));
    await save(['text_encoder_3/model.safetensors.index.json', index(...T5_SHARDS)]);
    expect((await choose()).files).toEqual(T5_SHARDS.map((name) => `text_encoder_3/${name}`));
  });

  test('takes a GGUF file', async () => {
    await save('transformer/sd3.5_medium-Q4_0.gguf', 'vae/diffusion_pytorch_model.safetensors');
    expect((await choose()).files).toEqual([
      'transformer/sd3.5_medium-Q4_0.gguf',
      'vae/diffusion_pytorch_model.safetensors',
    ]);
  });

  test('is refused with several files and no index', async () => {
    await save('transformer/a.safetensors', 'transformer/b.safetensors');
    expect(await refusal()).toMatchObject({
      code: 'bad-option',
      message: `${join(folder, 'transformer')} holds several files of weights ("a.safetensors", "b.safetensors") and no index of them; keep one there, or give the files themselves.`,
    });
  });

  test('is refused with pickles', async () => {
    await save(...DIFFUSERS, 'text_encoder_3/pytorch_model.bin');
    expect(await refusal()).toMatchObject({
      code: 'unsupported-model',
      message: /_3.pytorch_model\.bin is a .*pickle/,
    });
  });

  test('pickles beside safetensors files do not matter', async () => {
    await save(...DIFFUSERS, 'vae/diffusion_pytorch_model.bin');
    expect((await choose()).files).toEqual(DIFFUSERS);
  });
});

describe('split files', () => {
  test('are all files of the folder and of text_encoders', async () => {
    await save(...SPLIT, 'README.md', 'tokenizer_3/tokenizer.json', 'LICENSE');
    expect((await choose()).files).toEqual(SPLIT);
  });

  test("are found in ComfyUI's folders", async () => {
    const files = ['diffusion_models/sd3.5_medium.gguf', 'text_encoders/t5xxl_fp16.safetensors', 'vae/sd3.safetensors'];
    await save(...files);
    expect((await choose()).files).toEqual(files);
  });

  test('T5 in fp16 is taken before fp8, and scaled fp8 before plain', async () => {
    await save(...SPLIT);
    const formats = ['fp8_e4m3fn', 'fp8_e4m3fn_scaled', 'fp16'].map(
      (format) => `text_encoders/t5xxl_${format}.safetensors`,
    );
    for (const format of formats) {
      await save(format);
      const { files, notes } = await choose();
      expect(files).toEqual([...SPLIT, format]);
      expect(notes).toHaveLength(format === formats[0] ? 0 : 1);
    }
    expect((await choose()).notes).toEqual([
      `${join(folder, 'text_encoders')} holds "t5xxl" several times; "t5xxl_fp16.safetensors" is used (give the files themselves to choose another).`,
    ]);
  });

  test('versions in a name do not make it a copy', async () => {
    await save('sd3.safetensors', 'sd3.5_medium.safetensors', 'sd3.5_large.safetensors');
    expect((await choose()).files).toHaveLength(3);
  });

  test('shards are taken with and without an index', async () => {
    await save(...T5_SHARDS);
    expect((await choose()).files).toEqual(T5_SHARDS);
    await save(['model.safetensors.index.json', index(...T5_SHARDS)]);
    expect(await choose()).toEqual({ files: T5_SHARDS, notes: [] });
  });

  test("links are followed, as the hub's cache has them", async () => {
    await save('blobs/0a1b', 'snapshot/config.json');
    await symlink('../blobs/0a1b', join(folder, 'snapshot/sd3.5_medium.safetensors'));
    await symlink('snapshot', join(folder, 'link'));
    expect(await modelFiles(join(folder, 'link'))).toEqual([join(folder, 'link/sd3.5_medium.safetensors')]);
  });

  test('a folder with nothing but pickles is refused, and so is one with nothing', async () => {
    expect(await refusal()).toMatchObject({ code: 'missing-part', message: /holds no weights; give/ });
    await save('v1-5.ckpt', 'notes.txt');
    expect(await refusal()).toMatchObject({ code: 'unsupported-model', message: /v1-5\.ckpt is a Python pickle/ });
  });

  test('a folder of very many files is not read through', async () => {
    await Promise.all(Array.from({ length: 257 }, (_, i) => writeFile(join(folder, `${i}.safetensors`), '')));
    expect(await refusal()).toMatchObject({ code: 'bad-option', message: /holds 257 files of weights/ });
  });
});

describe('an index', () => {
  const place = 'transformer/diffusion_pytorch_model.safetensors.index.json';
  test.each<[string, string, RegExp]>([
    ['that is not JSON', '{', /it is not JSON/],
    ['without a list of files', '{"metadata": {}}', /no list "weight_map" of files/],
    ['with numbers for names', '{"weight_map": {"a": 1}}', /no list "weight_map" of files/],
    ['that names nothing', index(), /it names 0 files/],
    ['that names very many files', index(...Array.from({ length: 300 }, (_, i) => `${i}.safetensors`)), /300 files/],
    [
      'that leads out of the folder',
      index('../vae/x.safetensors'),
      /"\.\.\/vae\/x\.safetensors" is no \.safetensors file/,
    ],
    ['that leads out of the folder on Windows', index('C:x.safetensors'), /"C:x\.safetensors" is no/],
    ['with backslashes', index('..\\x.safetensors'), /is no \.safetensors file beside it/],
    ['that names another kind of file', index('passwd'), /"passwd" is no \.safetensors file beside it/],
    ['that is too long', ' '.repeat(2 ** 24 + 1), /it has 16777217 bytes/],
  ])('%s is refused', async (_, text, message) => {
    await save([place, text]);
    const error = await refusal();
    expect(error.code).toBe('bad-file');
    expect(error.message).toContain(`${join(folder, place)} is not a usable index of shards: `);
    expect(error.message).toMatch(message);
  });

  test('that names a shard which is not there is refused', async () => {
    await save([place, index('a.safetensors', 'b.safetensors')], 'transformer/a.safetensors');
    expect(await refusal()).toMatchObject({
      code: 'missing-part',
      message: `${join(folder, place)} names "b.safetensors", which is not there; download it, too.`,
    });
  });
});
