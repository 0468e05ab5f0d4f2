import { appendFile, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { fileSource } from '../../src/weights/files.node.ts';

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-files-'));
});
afterAll(() => rm(folder, { recursive: true }));

async function opened(name: string) {
  const path = join(folder, name);
  await writeFile(path, 'weights');
  return { path, source: await fileSource(path) };
}

describe('an open weight file', () => {
  it('is unchanged at first', async () => {
    const { source } = await opened('same');
    await expect(source.requireUnchanged!()).resolves.toBeUndefined();
    await source.close();
  });

  it('that grew is told in a sentence', async () => {
    const { path, source } = await opened('grown');
    await appendFile(path, ' more');
    await expect(source.requireUnchanged!()).rejects.toThrow(
      /grown was changed since it was opened; load the model again/,
    );
    await source.close();
  });

  it('that was replaced by one of the same size is told, too', async () => {
    const { path, source } = await opened('replaced');
    await rm(path);
    await writeFile(path, 'WEIGHTS');
    await expect(source.requireUnchanged!()).rejects.toThrow(/was changed/);
    await source.close();
  });

  it('that was removed is told', async () => {
    const { path, source } = await opened('removed');
    await rm(path);
    await expect(source.requireUnchanged!()).rejects.toThrow(/removed is gone since it was opened/);
    await source.close();
  });

  it('behind a link lies where the link leads, for programs that do not follow links', async () => {
    const { path, source } = await opened('blob');
    await symlink(path, join(folder, 'link.safetensors'));
    const linked = await fileSource(join(folder, 'link.safetensors'));
    expect(linked.name).toBe(join(folder, 'link.safetensors'));
    expect(linked.path).toBe(source.path);
    await Promise.all([source.close(), linked.close()]);
  });
});
