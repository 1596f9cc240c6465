%% Log events of this application: reports, with this as metadata.
%%
%% There is no `domain' in it: OTP's default handler shows no event of a domain but its own, and
%% these are the only trace of what they tell.
-include_lib("kernel/include/logger.hrl").

-define(LOG_META, #{application => erllama_cache_nif}).
