%% Log events of this application are reports with this metadata.
%%
%% It has no `domain', since OTP's default handler shows no event of any domain but its own.
-include_lib("kernel/include/logger.hrl").

-define(LOG_META, #{application => erllama_cache_nif,
                    report_cb => fun erllama_cache_log:text/1}).
