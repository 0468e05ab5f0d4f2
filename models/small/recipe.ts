/**
 * Makes the small model from nothing but the picture packages: `npm install && npm run train` in this folder, after
 * `npm install` in the repository. Killed at any moment, it goes on where it was when started again.
 */

import { join } from 'node:path';
import { main } from './command.ts';
import { FOLDER } from './paths.ts';
import { preparePictures } from './prepare.ts';
import { drawSheet } from './sheet.ts';

await preparePictures();
await main(['train', join(FOLDER, 'train.yaml')]);
await drawSheet();
