import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readdir, readFile, rm, stat, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { floats } from '../../src/tensor/data.ts';
import { ioError, writeFileAtomically } from '../../src/weights/atomic.node.ts';
import { fileSource, writeSafetensorsFile } from '../../src/weights/files.node.ts';
import { openSafetensors, readTensor } from '../../src/weights/safetensors.ts';

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

const chunk = (text: string) => new TextEncoder().encode(text);

describe('writing a file', () => {
  test('joins the chunks, replaces an older file and leaves nothing else', async () => {
    const path = join(folder, 'out.txt');
    await writeFile(path, 'something much longer than the new content', { mode: 0o600 });
    await writeFileAtomically(path, [chunk('one '), chunk(''), chunk('two')]);
    expect(await readFile(path, 'utf8')).toBe('one two');
    expect((await stat(path)).mode & 0o777).toBe(0o600);
    expect(await readdir(folder)).toEqual(['out.txt']);
  });

  test('a failing producer leaves the old file and no temporary one', async () => {
    const path = join(folder, 'out.txt');
    await writeFile(path, 'old');
    async function* failing() {
      yield chunk('half of the new ');
      throw new Error('out of ideas');
    }
    await expect(writeFileAtomically(path, failing())).rejects.toThrow('out of ideas');
    expect(await readFile(path, 'utf8')).toBe('old');
    expect(await readdir(folder)).toEqual(['out.txt']);
  });

  test('stops at an abort with the reason given', async () => {
    const controller = new AbortController();
    function* chunks() {
      yield chunk('a');
      controller.abort(new Error('enough'));
      yield chunk('b');
    }
    const path = join(folder, 'out.txt');
    await expect(writeFileAtomically(path, chunks(), { signal: controller.signal })).rejects.toThrow('enough');
    expect(await readdir(folder)).toEqual([]);
  });

  test('writes through a symbolic link', async () => {
    await writeFile(join(folder, 'real'), 'old');
    await symlink(join(folder, 'real'), join(folder, 'link'));
    await writeFileAtomically(join(folder, 'link'), [chunk('new')]);
    expect(await readFile(join(folder, 'real'), 'utf8')).toBe('new');
    expect((await readdir(folder)).sort()).toEqual(['link', 'real']);
  });

  test('a missing folder, a folder in the way and a file as a folder are named', async () => {
    await mkdir(join(folder, 'taken'));
    await writeFile(join(folder, 'file'), '');
    const write = (...parts: string[]) => writeFileAtomically(join(folder, ...parts), [chunk('x')]);
    await expect(write('absent', 'x.png')).rejects.toMatchObject({
      code: 'io',
      message: `Cannot write ${join(folder, 'absent', 'x.png')}: there is no such file or folder; check the path or create the folder first.`,
    });
    await expect(write('taken')).rejects.toThrow(/it is a folder/);
    await expect(write('file', 'x.png')).rejects.toThrow(/a file, not a folder/);
    expect((await readdir(folder)).sort()).toEqual(['file', 'taken']);
  });

  test.skipIf(!existsSync('/dev/full'))('a full disk is named', async () => {
    await expect(writeFileAtomically('/dev/full', [chunk('x')])).rejects.toMatchObject({
      code: 'io',
      message: 'Cannot write /dev/full: the disk is full; free some space or choose another folder.',
    });
    expect((await stat('/dev/full')).isCharacterDevice()).toBe(true);
  });

  test('every error of the system becomes one sentence and stays reachable as the cause', () => {
    for (const code of ['ENOSPC', 'EACCES', 'EROFS', 'ENOENT', 'EISDIR', 'EDQUOT']) {
      const cause = Object.assign(new Error(`${code}: raw`), { code });
      const error = ioError('write', 'a.png', cause);
      expect(error.message).toMatch(/^Cannot write a\.png: [a-z ,-]+; [a-z ,-]+\.$/);
      expect(error.cause).toBe(cause);
    }
    expect(ioError('read', 'a', new Error('strange')).message).toBe('Cannot read a: strange.');
  });
});

describe('weight files on disk', () => {
  test('are written and read back', async () => {
    const path = join(folder, 'x.safetensors');
    await writeSafetensorsFile(path, new Map([['x', floats([2], [1, 2])]]), { note: 'ü' });
    const source = await fileSource(path);
    const file = await openSafetensors(source);
    expect(file.metadata).toEqual({ note: 'ü' });
    expect((await readTensor(file, 'x')).data).toEqual(Float32Array.of(1, 2));
    expect((await source.read(source.size - 2, 100)).length).toBe(2);
    await source.close();
  });

  test('an absent file, a folder and a device are named', async () => {
    await expect(fileSource(join(folder, 'absent'))).rejects.toThrow(/Cannot read .*absent: there is no such file/);
    await expect(fileSource(folder)).rejects.toThrow(/it is a folder; give the path of a file/);
    await expect(fileSource('/dev/null')).rejects.toThrow(/device or a pipe/);
  });
});
