import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import sharp from 'sharp';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { writeTinyModel } from '../support/tiny-model.ts';

let folder: string;
let model: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-process-'));
  model = join(folder, 'tiny.safetensors');
  await writeTinyModel(model);
});
afterAll(() => rm(folder, { recursive: true }));

function mmditx(...argv: string[]): ChildProcess {
  return spawn(process.execPath, ['--import', 'tsx', 'src/cli/main.ts', ...argv], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
}

async function textOf(stream: AsyncIterable<Uint8Array>): Promise<string> {
  const pieces: Uint8Array[] = [];
  for await (const piece of stream) pieces.push(piece);
  return Buffer.concat(pieces).toString();
}

async function ended(child: ChildProcess) {
  const [[code], stdout, stderr] = await Promise.all([
    once(child, 'exit') as Promise<[number | null]>,
    textOf(child.stdout!),
    textOf(child.stderr!),
  ]);
  return { code, stdout, stderr };
}

it('draws a picture and ends', async () => {
  const output = join(folder, 'fox.png');
  const child = mmditx('generate', 'a fox', '--model', model, '--device', 'cpu', '--output', output);
  expect(await ended(child)).toEqual({ code: 0, stdout: `${output}\n`, stderr: '' });
});

it('stops at Ctrl-C with exit code 130 and without a picture', async () => {
  const out = join(folder, 'out');
  const preview = join(folder, 'preview.png');
  const child = mmditx(
    ...['generate', 'a fox', '--model', model, '--device', 'cpu', '--steps', '10000', '--preview', preview],
    ...['--output', join(out, 'x.png')],
  );
  const end = ended(child);
  while (!existsSync(preview) && child.exitCode === null) await delay(20);
  child.kill('SIGINT');
  const { code, stdout, stderr } = await end;
  expect({ code, stdout }).toEqual({ code: 130, stdout: '' });
  expect(stderr).toMatch(/Stopping.*\n.*Stopped/);
  expect(await readdir(out)).toEqual([]);
  // The preview is whole, too.
  expect(await sharp(preview).metadata()).toMatchObject({ width: 4, height: 4 });
});

it('tells a full disk behind its standard output', async () => {
  const child = spawn('sh', ['-c', `exec "${process.execPath}" --import tsx src/cli/main.ts --version > /dev/full`]);
  const { code, stderr } = await ended(child);
  expect(code).toBe(1);
  expect(stderr).toMatch(/^mmditx: Cannot write the output: .*ENOSPC.*\n$/);
});
